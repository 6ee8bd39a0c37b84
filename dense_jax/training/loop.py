"""The training loop: iterate, and call hooks."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol

import jax

from dense_jax.distributed import Agreement
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.metrics import MetricsWriter, Progress
from dense_jax.training.step import Metrics, Trainer, TrainState
from dense_jax.types import Batch


class Batches(Protocol):
  """Batches that know their position."""

  def __next__(self) -> Batch:
    """The next host batch."""

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON has it."""


@dataclasses.dataclass(frozen=True)
class Moment:
  """What a hook sees after a step.

  Attributes:
    step: updates done.
    state: after them. Only valid during the call: the next step consumes it.
    interrupted: the run was asked to stop here, before its last step.
  """

  step: int
  state: TrainState
  interrupted: bool


@dataclasses.dataclass(frozen=True)
class Hook:
  """Calls `run` after every `every`-th step, and after the last.

  Attributes:
    if_interrupted: also after the last step of a run that was interrupted.
  """

  every: int
  run: Callable[[Moment], None]
  if_interrupted: bool = True


class Interrupt:
  """Turns Ctrl-C and SIGTERM into a request to stop after the step.

  A second one is obeyed at once.
  """

  def __init__(self) -> None:
    self.requested = ""
    self._before: dict[signal.Signals, Any] = {}

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.requested:
      raise KeyboardInterrupt
    self.requested = signal.Signals(number).name

  def __enter__(self) -> "Interrupt":
    if threading.current_thread() is threading.main_thread():
      for name in (signal.SIGINT, signal.SIGTERM):
        self._before[name] = signal.signal(name, self._handle)
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: TracebackType | None,
  ) -> None:
    for name, handler in self._before.items():
      signal.signal(name, handler)


def train(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    steps: int,
    hooks: Sequence[Hook],
    on_metrics: Callable[[int, Metrics], None],
    interrupt: Interrupt,
) -> TrainState:
  """Trains up to `steps` updates, or until interrupted.

  Args:
    trainer: the compiled step.
    state: where to begin; it is consumed.
    batches: host batches, from the state's step on.
    steps: updates in all, with those done before.
    hooks: called in order, after their steps.
    on_metrics: called for each step, one step late: fetching a step's metrics while the
      next one runs does not hold up the device.
    interrupt: asked after each step; several processes stop after the same one.
  """
  step = int(state.step)
  pending: tuple[int, Metrics] | None = None
  agreement = Agreement()
  stop = agreement(bool(interrupt.requested))
  while step < steps and not stop:
    batch = trainer.put(next(batches))
    with jax.transfer_guard("disallow"):
      state, metrics = trainer.train_step(state, batch)
    step += 1
    if pending:
      on_metrics(*pending)
    pending = (step, metrics)
    # Asked once a step: who stops for a signal that comes later, in a hook, saves as well.
    stop = agreement(bool(interrupt.requested))
    interrupted = stop and step < steps
    due = [
        hook for hook in hooks
        if (hook.if_interrupted if interrupted else step == steps or not step % hook.every)
    ]
    if due or interrupted or step == steps:
      on_metrics(*pending)
      pending = None
    for hook in due:
      hook.run(Moment(step, state, interrupted))
  return state


class Logger:
  """Turns metrics into lines, events and the bar, every `every` steps."""

  def __init__(
      self, writer: MetricsWriter, progress: Progress, *, every: int, first_step: int,
      steps: int, tokens_per_step: int,
  ) -> None:
    self._writer, self._progress = writer, progress
    self._every, self._steps = every, steps
    self._tokens = tokens_per_step
    self._first = first_step + 1
    self._step, self._time = first_step, time.perf_counter()
    self._newest: Metrics = {}
    self.tokens_per_second: list[float] = []

  def pause(self) -> None:
    """Time until `resume` is not training time; waits for the steps under way."""
    jax.block_until_ready(self._newest)
    self._paused = time.perf_counter()

  def resume(self) -> None:
    """Ends `pause`."""
    self._time += time.perf_counter() - self._paused

  def __call__(self, step: int, metrics: Metrics) -> None:
    """For every step; waits for the device only where it logs."""
    self._progress.step(step)
    self._newest = metrics
    if step % self._every and step != self._steps:
      if step == self._first:  # It compiled: the clock starts after it.
        jax.block_until_ready(metrics)
        self._step, self._time = step, time.perf_counter()
      return
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.perf_counter()
    rate = (step - self._step) * self._tokens / max(now - self._time, 1e-9)
    self._step, self._time = step, now
    self.tokens_per_second.append(rate)
    self._writer.write(step, {**values, "tokens_per_second": rate})
    left = (self._steps - step) * self._tokens / rate
    self._progress.log(step, values["loss"], rate, left)


def checkpoint_hook(
    checkpoints: Checkpoints, batches: Batches, writer: MetricsWriter, every: int,
    heldout_loss: Callable[[Moment], float | None],
) -> Hook:
  """Saves state and data position, ranked by the held-out loss at that moment."""

  def save(moment: Moment) -> None:
    loss = heldout_loss(moment)
    writer.flush()  # A run that goes on from here finds all that was written before.
    checkpoints.save(moment.state, moment.step, batches.get_state(), loss)

  return Hook(every, save)
