"""Checkpoints of parameters, optimizer state, step and data position, written by orbax.

A checkpoint holds the parameters of each layer, and their moments, under `layers.<N>.<rest>`
(`dense_jax.models.params.by_layer`). It does not record how layers were scanned, so a run may
resume with another `block_layers`. A run with `train.ema` also saves the average of its parameters,
in the same form. Digests of all arrays are saved with it (`dense_jax.training.proof`), and compared
when it is restored.
"""

import contextlib
import functools
import logging
import math
import os
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dense_jax import distributed
from dense_jax.config import ModelConfig, invalid
from dense_jax.files import is_remote
from dense_jax.models.params import by_layer
from dense_jax.training import guard, stored
from dense_jax.training.checkpoint_reader import CheckpointReader, ranking_loss, state_items
from dense_jax.training.host_arrays import to_hosts
from dense_jax.training.proof import Proof, digest_json, prove
from dense_jax.training.step import TrainState
from dense_jax.training.stored import HELDOUT_LOSS, DamagedError, Stored, saved_steps

# After a save has failed, the first, second and third of those that try again begin so many seconds
# after the one before began. If the third fails too, the run stops.
_RETRY_SECONDS = (0.0, 10.0, 60.0)
_LOOK_SECONDS = 0.2
# The most times, 0.1 s apart, that what a failed save left is removed.
_MOST_REMOVED = 50
# Old checkpoints are renamed into this folder before they are deleted, so that a kill leaves none
# that lacks some of its files.
_DELETED = "deleted"
_LOG = logging.getLogger(__name__)


def check_name(folder: epath.Path, field: str) -> None:
  """Refuses a folder in which checkpoints could be written but not read again.

  The libraries that are used here interpret [...] as a pattern and a backslash as a slash, anywhere
  in the absolute path, and support only UTF-8.

  Raises:
    InputError: the path is such; the error names `field` and the whole path.
  """
  path = os.fspath(folder if is_remote(folder) else folder.absolute())
  # A surrogate stands for a byte that is not UTF-8.
  if re.search(r"\\|\[.*\]|[\ud800-\udfff]", path, re.DOTALL):
    raise invalid(
        field, path, "a path (with the current folder's, where it is relative) without "
        "[...], backslashes and bytes that are not UTF-8, as checkpoints there could not be read",
    )


def _loss(metrics: Mapping[str, float]) -> float:
  """Returns the loss that ranks a checkpoint."""
  return metrics[HELDOUT_LOSS]


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, which takes the losses that rank checkpoints from where they are proven."""

  def metrics(self, step: int) -> Mapping[str, float] | None:
    """Returns the metrics saved with a step; None means that none can be read."""
    loss = ranking_loss(Stored(self.directory, step))
    return None if loss is None else {HELDOUT_LOSS: loss}


def _warn(step: int, kind: str, text: str) -> None:
  del step, kind
  _LOG.warning("%s", text)


def clear_uncommitted(folder: epath.Path, tell: Callable[[int, str, str], None] = _warn) -> None:
  """Sets aside checkpoints whose commit file is damaged, for orbax would open none beside them.

  Called by one process, before `Checkpoints` opens the folder to write. Each is told as
  "set aside".

  Raises:
    DamagedError: no other checkpoint is left, so that nothing is changed.
  """
  damaged: dict[int, DamagedError] = {}
  steps = saved_steps(folder)
  for step in steps:
    try:
      Stored(folder, step).check_commit()
    except DamagedError as error:
      damaged[step] = error
  if damaged and len(damaged) == len(steps):
    raise _none_left(folder, damaged)
  for step, why in damaged.items():
    place = stored.set_aside(Stored(folder, step))
    tell(step, "set aside", f"{why}. It was set aside as {place}")


def _none_left(folder: epath.Path, damaged: Mapping[int, DamagedError]) -> DamagedError:
  """Makes the error of a run that has no checkpoint to go on from."""
  why = "\n".join(f"  {error}" for _, error in sorted(damaged.items()))
  workdir = folder.parent
  return DamagedError(
      f"no checkpoint in {folder} can be gone on from:\n{why}\nNothing was changed there. Expected "
      "at least one whole checkpoint: put one back from a copy and check it with\n"
      f"  python -m dense_jax.cli.verify --workdir {workdir}\n"
      f"or begin again in another folder, as with --workdir {workdir}-again"
  )


def _manager(folder: epath.Path, last: int, best: int, every: int) -> ocp.CheckpointManager:
  preserve: list[Any] = [policies.LatestN(last)]
  if best:
    preserve.append(
        policies.BestN(
            get_metric_fn=_loss,
            reverse=True,  # The lowest loss is the best.
            n=best,
            keep_checkpoints_without_metrics=False,
        )
    )
  if every:
    preserve.append(policies.EveryNSteps(every))
  options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(preserve),
      best_fn=_loss,
      best_mode="min",
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,
      todelete_subdir=_DELETED,
  )
  return _Manager(folder, options=options)


class Checkpoints(CheckpointReader):
  """A run's checkpoints, saved asynchronously; each one is complete or absent.

  The newest `keep_last`, the best `keep_best`, by held-out loss, and those of every `keep_every`-th
  step are kept.

  Args:
    folder: where the checkpoints are or will be.
    model: the model's configuration, which says how its layers are scanned now.
    keep_last: the number of newest checkpoints to keep.
    keep_best: the number of best checkpoints to keep besides.
    keep_every: keeps each checkpoint whose step is a multiple of it besides; 0 means none.
    tell: called with steps done, what happened ("save failed" or "set aside") and a sentence for
      people.
  """

  def __init__(
      self, folder: epath.Path, model: ModelConfig, *, keep_last: int = 1, keep_best: int = 0,
      keep_every: int = 0, tell: Callable[[int, str, str], None] = _warn,
  ) -> None:
    super().__init__(folder, model)
    self._open = functools.partial(_manager, self._folder, keep_last, keep_best, keep_every)
    self._manager = self._open()
    self._tell = tell
    self._under_way = False
    self._saved, self._step = time.monotonic(), 0
    self._error: Exception | None = None
    self._failures = 0
    self._deleter: threading.Thread | None = None
    logging.getLogger("asyncio").addFilter(_is_news)
    self._empty_deleted()

  def steps(self) -> list[int]:
    """Returns the steps of the checkpoints, in order, with the one that is being saved."""
    return sorted(self._manager.all_steps())

  def save(
      self, state: TrainState, step: int, data: Mapping[str, Any], heldout_loss: float | None
  ) -> bool:
    """Starts saving; the state's values are copied before it returns.

    If the save before failed, what it left is removed first.

    Args:
      state: the state after `step` updates.
      step: its step.
      data: the position in the data, as JSON values.
      heldout_loss: mean nats per token, by which checkpoints are ranked; None means unknown. A
        checkpoint whose loss is not finite is not ranked.

    Returns:
      True if the step is saved, or will be unless the save fails (see `wants_save`). False if a
      number of the state is not finite: no later step would be better, and this checkpoint would
      take the place of a good one.

    Raises:
      Exception: the save before failed, and so did those before it; or one of several processes
        failed.
    """
    self._recover()
    self._saved, self._step = time.monotonic(), step
    if self.latest == step:
      return True
    arrays, infinite = prove(state_items(state), self._model)
    if infinite:
      return False
    if state.guard is not None:
      data = {**data, stored.GUARD: guard.as_json(state.guard)}
    ranked = heldout_loss is not None and math.isfinite(heldout_loss)
    proof = Proof(step, arrays, digest_json(data), heldout_loss if ranked else None)
    items = state_items(by_layer(self._model, state, split=to_hosts))
    try:
      self._manager.save(
          step,
          args=ocp.args.Composite(**{
              **{item: ocp.args.StandardSave(tree) for item, tree in items.items()},
              stored.DATA: ocp.args.JsonSave(dict(data)),
              stored.DIGESTS: ocp.args.JsonSave(proof.to_json()),
          }),
          metrics={HELDOUT_LOSS: heldout_loss} if ranked else None,
          force=True,
      )
      self._under_way = True
    except OSError as error:
      if jax.process_count() > 1:  # The others wait for this one inside orbax.
        raise
      self._fail(error)
    return True

  def wants_save(self, minutes: float) -> bool:
    """Returns whether this process wants to save before that is due; never waits.

    It does if the last save has failed, which is told at once, or was begun so many minutes ago;
    0 minutes mean never.
    """
    if self._under_way and not self._manager.is_saving_in_progress():
      self._settle()
    now = time.monotonic()
    if self._error is not None:
      return self._is_last_try or now - self._saved >= _RETRY_SECONDS[self._failures]
    return not self._under_way and 0 < 60 * minutes <= now - self._saved

  def wait_to_retry(self, stop: Callable[[], bool]) -> None:
    """Waits until a save that failed may be tried again, or `stop` returns true."""
    while self._error is not None and not self.wants_save(0) and not stop():
      time.sleep(_LOOK_SECONDS)

  def is_saved(self) -> bool:
    """Waits for the last save; returns whether it succeeded, in all processes."""
    self._settle()
    return not distributed.any_process(self._error is not None)

  def _settle(self) -> None:
    """Waits for the save that is under way, and keeps its error."""
    if not self._under_way:
      return
    self._under_way = False
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # Whatever the storage raises.
      self._fail(error)
    else:
      self._failures = 0
      self._empty_deleted()

  @property
  def _is_last_try(self) -> bool:
    return self._failures == len(_RETRY_SECONDS)

  def _fail(self, error: Exception) -> None:
    self._error = error
    after = "and another save is tried" if not self._is_last_try else "like those before it"
    steps = saved_steps(self._folder)
    newest = f"the newest is of step {steps[-1]}" if steps else "there is none"
    self._tell(
        self._step, "save failed", f"the checkpoint of step {self._step} could not be saved, "
        f"{after}; {newest} ({stored.first_line(error)})"
    )

  def _recover(self) -> None:
    """Waits for the save before; if it failed, removes what it left, so that another may begin.

    Raises:
      Exception: too many saves have failed, one after the other.
    """
    self._settle()
    if not distributed.any_process(self._error is not None):
      return
    error, self._error = self._error, None
    # Of several processes, those that did not fail may still wait for one that did, inside orbax.
    if self._is_last_try or jax.process_count() > 1:
      raise error or OSError("another process could not save its part of a checkpoint: see there")
    self._failures += 1
    with contextlib.suppress(Exception):
      self._manager.close()
    self._remove_unfinished()
    self._manager = self._open()

  def _remove_unfinished(self) -> None:
    """Removes what a failed save left, also what its threads still write, for some seconds."""
    for _ in range(_MOST_REMOVED):
      unfinished = [*self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*")]
      if is_remote(self._folder) or not unfinished:
        return
      for place in unfinished:
        shutil.rmtree(place, ignore_errors=True)
      time.sleep(0.1)

  def _empty_deleted(self) -> None:
    """Deletes, in a thread, the checkpoints that are to be deleted; not their folder.

    A save that ends just now may rename another one into it.
    """
    folder = self._folder / _DELETED
    if is_remote(folder) or not distributed.is_first() or not folder.is_dir():
      return
    if self._deleter is None or not self._deleter.is_alive():
      self._deleter = threading.Thread(target=_empty, args=(folder,), name="checkpoint deleter")
      self._deleter.start()

  def restore_newest(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Restores the newest whole checkpoint, in every process the same; see `restore`.

    Newer ones that are damaged are named in a warning, and set aside beside the folder.

    Raises:
      UnfitError: the newest whole checkpoint is of another model or optimizer.
      DamagedError: no checkpoint is whole; nothing is changed.
    """
    self._recover()
    damaged: dict[int, DamagedError] = {}
    for step in sorted(self.steps(), reverse=True):
      try:
        restored = self.restore(shapes, step)
      except DamagedError as error:
        # Without its traceback, which would keep the arrays that were read.
        damaged[step] = DamagedError(str(error), error.what)
        continue
      for other, why in damaged.items():
        distributed.by_first(functools.partial(self._set_aside, other, why, step))
      if damaged:
        self._manager.reload()
      return restored
    raise _none_left(self._folder, damaged)

  def _set_aside(self, step: int, error: DamagedError, instead: int) -> None:
    place = stored.set_aside(Stored(self._folder, step))
    self._tell(
        instead, "set aside", f"{error}. It was set aside as {place}; the run goes on from step "
        f"{instead}, and does {step - instead} steps again"
    )

  def wait(self) -> None:
    """Waits for the last save.

    Raises:
      Exception: the save failed.
    """
    self._settle()
    if self._error is not None:
      raise self._error

  def close(self) -> None:
    """Waits for the last save and ends the threads, even if the save failed."""
    try:
      self.wait()
    finally:
      self._manager.close()
      if self._deleter is not None:
        self._deleter.join()
        _empty(self._folder / _DELETED)
        with contextlib.suppress(OSError):
          (self._folder / _DELETED).rmdir()


def _is_news(record: logging.LogRecord) -> bool:
  """Filters out what asyncio says of orbax's other writes when one has failed, which is told."""
  error = record.exc_info[1] if record.exc_info else None
  frames = traceback.walk_tb(error.__traceback__) if error else ()
  return not any(ocp.__name__.partition(".")[0] in frame.f_code.co_filename for frame, _ in frames)


def _empty(folder: epath.Path) -> None:
  for entry in folder.iterdir() if folder.is_dir() else ():
    shutil.rmtree(entry, ignore_errors=True)
