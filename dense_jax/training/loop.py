"""The training loop: runs steps, and calls hooks after them."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from dense_jax.batch import Batch
from dense_jax.distributed import Agreement
from dense_jax.errors import InputError
from dense_jax.interrupt import Interrupt
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.metrics import MetricsWriter, Progress
from dense_jax.training.step import Metrics, Trainer, TrainState, has_layers

# Names in the records of a training step: tokens per second; the share of the time that the devices
# waited for data; seconds of training since the record before.
SPEED, DATA_WAIT, TRAIN_SECONDS = "tokens_per_second", "data_wait", "train_seconds"


class Batches(Protocol):
  """An iterator of batches that knows its position."""

  def __next__(self) -> Batch:
    """Returns the next host batch."""

  def get_state(self) -> dict[str, Any]:
    """Returns the position, as JSON values."""


class DataWait:
  """Adds up the time for which the devices had nothing to do but to wait for the next batch.

  Attributes:
    seconds: that time so far. A wait that ended before the step under way did cost nothing.
  """

  def __init__(self) -> None:
    self.seconds = 0.0

  def next(self, batches: Iterator[Batch], under_way: Mapping[str, Any]) -> Batch:
    """Returns the next batch.

    Args:
      batches: the batches.
      under_way: the metrics of the step that was sent to the devices last.
    """
    began = time.perf_counter()
    batch = next(batches)
    if all(value.is_ready() for value in under_way.values()):
      self.seconds += time.perf_counter() - began
    return batch


@dataclasses.dataclass(frozen=True)
class Moment:
  """A moment of training, after a step, as a hook sees it.

  Attributes:
    step: updates done.
    state: the state after them. Valid only during the call, as the next step consumes it.
    interrupted: true if the run was asked to stop here, before its last step.
  """

  step: int
  state: TrainState
  interrupted: bool


@dataclasses.dataclass(frozen=True)
class Hook:
  """A function to call after every `every`-th step, and after the last one.

  Attributes:
    every: steps between calls.
    run: the function.
    if_interrupted: whether to call it also after the last step of a run that was interrupted.
  """

  every: int
  run: Callable[[Moment], None]
  if_interrupted: bool = True


def train(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    steps: int,
    hooks: Sequence[Hook],
    on_metrics: Callable[[int, Metrics], bool],
    interrupt: Interrupt,
    data_wait: DataWait,
    meanwhile: Callable[[], str] = lambda: "ended between two steps",
) -> TrainState:
  """Trains up to `steps` updates, or until interrupted.

  Args:
    trainer: the compiled step.
    state: the state to begin with; it is consumed.
    batches: host batches, from the state's step on.
    steps: the total number of updates, including those that are already done.
    hooks: called in order, after their steps.
    on_metrics: called for each step, one step late: fetching a step's metrics while the
      next one runs does not hold up the device. Whether it returns true must be the same in all
      processes; training then ends at once, without hooks.
    interrupt: checked after each step; several processes stop after the same one. Until the
      first step is done there is nothing to save, and a request is obeyed at once.
    data_wait: adds up the time that is spent waiting for batches.
    meanwhile: returns a sentence that says what is saved, if a second request ends the process.

  Returns:
    The state after the last step.

  Raises:
    InputError: the first step does not fit the devices' memory.
    Stopped: a request to end came before the first step was done.
  """
  first = step = int(state.step)
  pending: tuple[int, Metrics] | None = None
  agreement = Agreement()
  stop = agreement(bool(interrupt.requested))
  while step < steps and not stop:
    batch = trainer.put(data_wait.next(batches, pending[1] if pending else {}))
    with jax.transfer_guard("disallow"):
      if step == first:
        state, metrics = _first_step(trainer, state, batch, step + 1)
        interrupt.wait(meanwhile)
      else:
        state, metrics = trainer.step_at(step + 1)(state, batch)
    step += 1
    if pending and on_metrics(*pending):
      return state
    pending = (step, metrics)
    # Checked only here: after a signal during a hook, one more step runs, and is saved as well.
    stop = agreement(bool(interrupt.requested))
    interrupted = stop and step < steps
    due = [
        hook for hook in hooks
        if (hook.if_interrupted if interrupted else step == steps or not step % hook.every)
    ]
    if due or interrupted or step == steps:
      if on_metrics(*pending):
        return state
      pending = None
    for hook in due:
      hook.run(Moment(step, state, interrupted))
  return state


def _first_step(
    trainer: Trainer, state: TrainState, batch: Batch, step: int
) -> tuple[TrainState, Metrics]:
  """Compiles and runs a step; a lack of memory is an InputError, as no restart would help."""
  try:
    trainer.compile(state, batch)
    return jax.block_until_ready(trainer.step_at(step)(state, batch))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise InputError(
        "a training step does not fit the devices' memory: expected a smaller "
        "config.train.batch_size, a larger config.train.accumulate, config.model.remat=full, or "
        f"more devices ({str(error).partition(chr(10))[0]})"
    ) from error


class Logger:
  """Turns metrics into records, events and progress lines.

  All are written every `every` steps and after the last one; records and events also after each
  step whose layers were measured.
  """

  def __init__(
      self, writer: MetricsWriter, progress: Progress, *, every: int, first_step: int,
      steps: int, tokens_per_step: int, data_wait: DataWait,
  ) -> None:
    self._writer, self._progress = writer, progress
    self._every, self._steps = every, steps
    self._tokens = tokens_per_step
    self._first = first_step + 1
    self._step, self._time = first_step, time.perf_counter()
    self._data_wait, self._waited = data_wait, data_wait.seconds
    self._newest: Metrics = {}

  def pause(self) -> None:
    """Stops the clock, because the time until `resume` is not training time.

    Waits for the steps that are under way.
    """
    jax.block_until_ready(self._newest)
    self._paused = time.perf_counter()

  def resume(self) -> None:
    """Starts the clock again after `pause`."""
    self._time += time.perf_counter() - self._paused

  def __call__(self, step: int, metrics: Metrics) -> None:
    """Takes the metrics of each step; waits for the device only if it writes."""
    self._progress.step(step)
    self._newest = metrics
    if step % self._every and step != self._steps:
      if has_layers(metrics):
        self._writer.write(step, _floats(metrics))
      if step == self._first:  # It includes compilation, so the clock starts after it.
        jax.block_until_ready(metrics)
        self._step, self._time = step, time.perf_counter()
        self._waited = self._data_wait.seconds
      return
    values = _floats(metrics)
    now, waited = time.perf_counter(), self._data_wait.seconds
    seconds = max(now - self._time, 1e-9)
    rate = (step - self._step) * self._tokens / seconds
    values |= {
        SPEED: rate, DATA_WAIT: (waited - self._waited) / seconds,
        TRAIN_SECONDS: 0.0 if step == self._first else seconds,
    }
    self._step, self._time, self._waited = step, now, waited
    self._writer.write(step, values)
    left = (self._steps - step) * self._tokens / rate
    self._progress.log(step, values["loss"], rate, left)


def _floats(metrics: Metrics) -> dict[str, float]:
  return {name: float(value) for name, value in jax.device_get(metrics).items()}


def checkpoint_hook(
    checkpoints: Checkpoints, batches: Batches, writer: MetricsWriter, every: int,
    heldout_loss: Callable[[Moment], float | None],
) -> Hook:
  """Makes a hook that saves the state and the data's position, ranked by held-out loss.

  The hook raises an InputError if the state is not finite, because no later state would be.
  """

  def save(moment: Moment) -> None:
    loss = heldout_loss(moment)
    writer.flush()  # A run that resumes from here finds all earlier records.
    before = checkpoints.latest
    if not checkpoints.save(moment.state, moment.step, batches.get_state(), loss):
      kept = "there is none before it" if before is None else f"the one of step {before} is kept"
      raise InputError(
          f"after step {moment.step} the parameters or the optimizer's moments are not finite any "
          f"more, and no later step would mend that: no checkpoint of it is saved, {kept}. "
          "Expected a smaller config.optimizer.learning_rate, a longer warm-up, or clipping "
          "(config.optimizer.clip_norm)"
      )

  return Hook(every, save)
