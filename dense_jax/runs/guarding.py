"""Takes a run back whose guard skips one step after the other, or stops it with a diagnosis.

The guard (`dense_jax.training.guard`) decides on the device about each step. Here the host reads
its counts where it reads the loss anyway. After `guard.in_a_row` skipped steps the run goes back to
its newest checkpoint and passes over all batches since then: not only those that were skipped, for
they change nothing, but also those before them that led there. What is passed over is written down
before training goes on, so that every later start passes over the same.
"""

import dataclasses
import json
import math
from collections.abc import Callable

import jax.numpy as jnp
from etils import epath

from dense_jax import distributed
from dense_jax.config import ExperimentConfig
from dense_jax.data.cache import digest
from dense_jax.data.passing import PassingOver
from dense_jax.errors import DivergedError, InputError
from dense_jax.files import read_object, write_atomically
from dense_jax.formatting import table
from dense_jax.outputs import write_json
from dense_jax.runs import resume
from dense_jax.runs.workdir import CHECKPOINTS
from dense_jax.training.diagnosis import Diagnosis, diagnose
from dense_jax.training.events import note_event
from dense_jax.training.guard import IN_A_ROW, SKIPPED
from dense_jax.training.loop import Moment
from dense_jax.training.step import Metrics, Trainer, TrainState
from dense_jax.training.stored import saved_steps

PASSED_FILE = "passed_over.json"
DIAGNOSIS_FILE = "diagnosis.json"


@dataclasses.dataclass(frozen=True)
class _Returns:
  """The returns to one checkpoint, since a person last started the run after it had stopped.

  Attributes:
    step: the checkpoint's.
    count: how often the run went back to it.
  """

  step: int = 0
  count: int = 0


class Guarding:
  """Watches what a run's guard skips, and takes the run back."""

  def __init__(
      self, workdir: epath.Path, config: ExperimentConfig, batches: PassingOver,
      say: Callable[[str], None],
  ) -> None:
    """Passes over the batches that the run in the folder has passed over before.

    Args:
      workdir: the run's folder.
      config: the run's configuration.
      batches: the run's batches, at their beginning.
      say: prints a sentence.

    Raises:
      InputError: what the folder says about it is damaged.
    """
    self._workdir, self._config, self._say = workdir, config, say
    self._batches = batches
    self._identity = {key: value for key, value in batches.get_state().items() if key != "step"}
    self._course = digest(json.dumps(resume.course(config), sort_keys=True))
    self._returns = _Returns()
    self._skipped = 0
    self._read()
    distributed.check_same({f"--workdir ({PASSED_FILE})": batches.spans})

  def _read(self) -> None:
    file = self._workdir / PASSED_FILE
    if not file.is_file():
      return
    valid = "what a run wrote: spans, step, returns, batches and course"
    values = read_object(file, valid)
    try:
      spans = [(int(first), int(end)) for first, end in values["spans"]]
      returns = _Returns(int(values["step"]), int(values["returns"]))
      identity, course = values["batches"], values.get("course", self._course)
    except (KeyError, TypeError, ValueError) as error:
      raise InputError(f"{file} is not valid: expected {valid}") from error
    # With a checkpoint the course may have been changed by name. Without one, another course is
    # that of another run, which was begun here before.
    has_checkpoint = bool(saved_steps(self._workdir / CHECKPOINTS))
    if identity == self._identity and (has_checkpoint or course == self._course):
      self._batches.pass_over(spans)
      self._returns = returns
    elif not has_checkpoint:
      distributed.by_first(lambda: file.unlink(missing_ok=True))

  def _write(self) -> None:
    content = {
        "batches": self._identity, "spans": self._batches.spans, "step": self._returns.step,
        "returns": self._returns.count, "course": self._course,
    }
    file = self._workdir / PASSED_FILE
    distributed.by_first(lambda: write_atomically(file, json.dumps(content, indent=1).encode()))

  def begin(self, state: TrainState) -> None:
    """Takes note of what was skipped before a state to go on from."""
    self._skipped = 0 if state.guard is None else int(state.guard.skipped)

  def look(self, step: int, metrics: Metrics) -> bool:
    """Reads what was skipped, after a step that is logged or saved; records and says it.

    Args:
      step: the step.
      metrics: its metrics.

    Returns:
      Whether so many were skipped in a row that the run has to go back.
    """
    train = self._config.train
    if SKIPPED not in metrics or (
        step % train.log_every and step % train.checkpoint_every and step != train.steps
    ):
      return False
    skipped, in_a_row = int(metrics[SKIPPED]), int(metrics[IN_A_ROW])
    if skipped > self._skipped:
      row = ""
      if in_a_row:  # This step is one of them.
        row = (f", {in_a_row} in a row by now (loss {float(metrics['loss']):.4g}, gradient norm "
               f"{float(metrics['grad_norm']):.4g})")
      self._record(step, "skipped", f"skipped {skipped - self._skipped} of the last steps{row}")
    self._skipped = skipped
    return in_a_row >= self._config.guard.in_a_row

  def must_return(self, state: TrainState) -> bool:
    """Returns whether a run has to go back, when training has ended with this state."""
    guard = state.guard
    return guard is not None and int(guard.in_a_row) >= self._config.guard.in_a_row

  def holds_off(self, moment: Moment) -> bool:
    """Returns whether no checkpoint is to be saved, as steps are just being skipped.

    The newest checkpoint is what the run goes back to, and has to be one of before. If the run ends
    here, the steps until now are worth more than that, unless it has to go back anyway.
    """
    if moment.state.guard is None:
      return False
    ends = moment.interrupted or moment.step == self._config.train.steps
    return self.must_return(moment.state) or (not ends and int(moment.state.guard.in_a_row) > 0)

  def go_back(self, state: TrainState, trainer: Trainer, target: int) -> None:
    """Passes over the batches since a checkpoint, for a run that is to go on from there.

    Args:
      state: the state after too many skipped steps.
      trainer: the run's trainer.
      target: the step of the newest checkpoint; 0 means that there is none, and the run begins
        again.

    Raises:
      DivergedError: the run went back to this checkpoint `guard.returns` times already.
    """
    guard = self._config.guard
    assert state.guard is not None
    step, in_a_row = int(state.step), int(state.guard.in_a_row)
    begin = step - in_a_row  # The last step that was taken.
    end = begin + guard.in_a_row  # Later ones were skipped whatever they were.
    count = self._returns.count + 1 if self._returns.step == target else 1
    if count > guard.returns:
      self._stop(state, trainer, target, begin)
    first, last = self._batches.number(target), self._batches.number(end - 1)
    self._batches.pass_over([(first, last + 1)])
    self._returns = _Returns(target, count)
    self._write()
    self._record(
        end, "returned", f"steps {begin + 1} to {end} were skipped one after the other: back to "
        f"step {target}, and batches {first} to {last} are passed over (return {count} of at most "
        f"{guard.returns} to this step)"
    )

  def _stop(self, state: TrainState, trainer: Trainer, target: int, begin: int) -> None:
    """Finds out where numbers go wrong, writes it down, and raises `DivergedError`."""
    self._say("looking for the layer in which numbers go wrong")
    number = self._batches.number(begin)
    self._batches.go_to(begin)
    found = diagnose(trainer.inside(state.params, trainer.put(next(self._batches))))
    where = f"not finite first: {found.first}"
    content = {"step": begin, "batch": number, **dataclasses.asdict(found)}
    distributed.by_first(
        lambda: write_json(self._workdir / DIAGNOSIS_FILE, content, "--workdir")
    )
    self._say(f"batch {number}, loss {found.loss:.4g}; {where}\n{layer_table(found)}")
    self._returns = _Returns()  # Who starts the run again has changed something.
    self._write()
    text = (
        f"after {self._config.guard.in_a_row} skipped steps in a row, and "
        f"{self._config.guard.returns} returns to step {target}; {where}"
    )
    self._record(begin, "stopped", text)
    raise DivergedError(
        f"the run stops {text}. {DIAGNOSIS_FILE} in {self._workdir} has the figures of each layer. "
        f"Step {target} is saved; to go on from there, change what led here, such as "
        "--config.optimizer.learning_rate with --allow-change optimizer.learning_rate"
    )

  def _record(self, step: int, kind: str, text: str) -> None:
    self._say(f"step {step}  {text}")
    note_event(self._workdir, step, kind, text)


def layer_table(found: Diagnosis) -> str:
  """Tabulates each layer's residual stream and largest gradient, the last layer first."""
  rows = [("layer", "activations (rms)", "largest gradient norm", "of")]
  for layer in reversed(range(len(found.activations))):
    norms = found.gradients[layer]
    largest = max(norms, key=lambda name: (not math.isfinite(norms[name]), norms[name]))
    rows.append((str(layer), f"{found.activations[layer]['residual_rms']:.4g}",
                 f"{norms[largest]:.4g}", largest))
  return table(rows)


def with_fresh_count(state: TrainState) -> TrainState:
  """Returns the state of a checkpoint for a run that went back to it: nothing in a row yet."""
  guard = state.guard
  if guard is None:
    return state
  zero = jnp.zeros_like(guard.in_a_row, device=guard.in_a_row.sharding)
  return dataclasses.replace(state, guard=dataclasses.replace(guard, in_a_row=zero))
