"""Checkpoints of parameters, optimizer state, step and data position, written by orbax.

A checkpoint holds the parameters of each layer, and their moments, under `layers.<N>.<rest>`
(`dense_jax.models.params.by_layer`). It does not record how layers were scanned, so a run may
resume with another `block_layers`. A run with `train.ema` also saves the average of its parameters,
in the same form. Stacked arrays are split on the way from the devices to the
memory of their hosts, and stacked on the way back, so that no device holds a second copy of the
state.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dense_jax import distributed
from dense_jax.config import ModelConfig, invalid
from dense_jax.errors import InputError
from dense_jax.files import is_remote, parse_json
from dense_jax.models.params import (
    as_scanned,
    by_layer,
    row_sharding,
    split_rows,
    stack_rows,
    stacked_sharding,
)
from dense_jax.training import guard
from dense_jax.training.step import TrainState
from dense_jax.types import Params, PyTree

T = TypeVar("T")

HELDOUT_LOSS = "heldout_loss"
# The name of the average in a checkpoint, and of the choice to take it.
_EMA = "ema"
# The name of the guard's state beside the data's position.
_GUARD = "guard"
# The most attempts to read, in case a run saves and deletes faster than this process reads.
_MOST_TRIED = 20
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


def saved_steps(folder: epath.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, in order; changes nothing there."""
  if not folder.is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(folder))


def _loss(metrics: Mapping[str, float]) -> float:
  """Returns the loss that ranks a checkpoint: infinite, and so last, if it is not finite."""
  loss = metrics[HELDOUT_LOSS]
  return loss if math.isfinite(loss) else math.inf


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, which opens checkpoints even if a held-out loss among them is unreadable."""

  def metrics(self, step: int) -> Mapping[str, float] | None:
    """Returns the metrics saved with a step; None means that none can be read."""
    try:
      metrics = super().metrics(step)
      if metrics is not None:
        _loss(metrics)
      return metrics
    except (OSError, KeyError, TypeError, ValueError) as error:
      _LOG.warning("the held-out loss of checkpoint %d cannot be read, and ranks nothing (%s)",
                   step, error)
      return None


def _manager(
    folder: epath.Path, keep_last: int, keep_best: int, read_only: bool
) -> ocp.CheckpointManager:
  preserve: list[Any] = [policies.LatestN(keep_last)]
  if keep_best:
    preserve.append(
        policies.BestN(
            get_metric_fn=_loss,
            reverse=True,  # The lowest loss is the best.
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
    )
  options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(preserve),
      best_fn=_loss,
      best_mode="min",
      enable_async_checkpointing=True,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
  )
  return _Manager(folder, options=options)


def _retried(action: Callable[[], T]) -> T:
  """Returns the action's result; repeats it if another process deleted a file that it needs."""
  for _ in range(_MOST_TRIED):
    with contextlib.suppress(FileNotFoundError):
      return action()
  return action()


class Checkpoints:
  """A run's checkpoints, saved asynchronously; each one is complete or absent.

  The newest `keep_last` and the best `keep_best`, by held-out loss, are kept.

  Args:
    folder: where the checkpoints are or will be.
    model: the model's configuration, which says how its layers are scanned now.
    keep_last: the number of newest checkpoints to keep.
    keep_best: the number of best checkpoints to keep besides.
    read_only: changes nothing in the folder.
  """

  def __init__(
      self, folder: epath.Path, model: ModelConfig, *, keep_last: int = 1, keep_best: int = 0,
      read_only: bool = False,
  ) -> None:
    self._folder = folder if is_remote(folder) else folder.absolute()
    self._model = model
    self._manager = _retried(lambda: _manager(self._folder, keep_last, keep_best, read_only))

  @property
  def latest(self) -> int | None:
    """The newest checkpoint's step; None means that there is no checkpoint."""
    return self._manager.latest_step()

  def save(
      self, state: TrainState, step: int, data: Mapping[str, Any], heldout_loss: float | None
  ) -> bool:
    """Starts saving; the state's values are copied before it returns.

    Args:
      state: the state after `step` updates.
      step: its step.
      data: the position in the data, as JSON values.
      heldout_loss: mean nats per token, by which checkpoints are ranked; None means unknown. A
        checkpoint whose loss is not finite is not ranked.

    Returns:
      True if the step is saved or will be. False if a number of the state is not finite: no later
      step would be better, and this checkpoint would take the place of a good one.
    """
    if self._manager.latest_step() == step:
      return True
    if not distributed.to_host(_all_finite((state.params, state.opt_state, state.ema))):
      return False
    if state.guard is not None:
      data = {**data, _GUARD: guard.as_json(state.guard)}
    state = by_layer(self._model, state, split=_to_hosts)
    ranked = heldout_loss is not None and math.isfinite(heldout_loss)
    self._manager.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"step": state.step, "optimizer": state.opt_state}),
            data=ocp.args.JsonSave(dict(data)),
            **({} if state.ema is None else {_EMA: ocp.args.StandardSave(state.ema)}),
        ),
        metrics={HELDOUT_LOSS: heldout_loss} if ranked else None,
        force=True,
    )
    return True

  def restore(self, shapes: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """Restores a step; returns its state, placed as `shapes` says, and the data's position.

    If `shapes` has an average of the parameters and the checkpoint has none, the average begins
    with the parameters. An average for which `shapes` has no place is not read. The same holds for
    the guard, whose state begins with nothing skipped.

    Raises:
      InputError: a part of the checkpoint is missing, damaged or of another form.
    """
    state, data = self._restore(dataclasses.replace(shapes, guard=None), step)
    judged = guard.from_json(shapes.guard, data.pop(_GUARD, {}))
    return dataclasses.replace(state, guard=judged), data

  def _restore(self, shapes: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """Restores everything but the guard; see `restore`."""
    layers = _on_hosts(by_layer(self._model, shapes))
    has_ema = shapes.ema is not None and self._has_ema(step)
    restored = self._read(
        step,
        ocp.args.Composite(
            params=ocp.args.StandardRestore(layers.params),
            optimizer=ocp.args.StandardRestore(
                {"step": layers.step, "optimizer": layers.opt_state}
            ),
            data=ocp.args.JsonRestore(),
            **({_EMA: ocp.args.StandardRestore(layers.ema)} if has_ema else {}),
        ),
    )
    rest = restored["optimizer"]
    ema = restored[_EMA] if has_ema else None
    state = TrainState(rest["step"], restored["params"], rest["optimizer"], ema)
    if shapes.ema is None or has_ema:
      return self._join(state, shapes), restored["data"]
    state = self._join(state, dataclasses.replace(shapes, ema=None))
    began = dataclasses.replace(state, ema=jax.tree.map(jnp.copy, state.params))
    return began, restored["data"]

  def _has_ema(self, step: int) -> bool:
    """Returns whether a checkpoint was saved with an average, which may be damaged now."""
    folder = self._folder / str(step)
    try:
      saved = parse_json((folder / "_CHECKPOINT_METADATA").read_bytes())
      return _EMA in saved["item_handlers"]
    except (OSError, KeyError, TypeError, ValueError):  # Damaged.
      return (folder / _EMA).is_dir()

  def _join(self, tree: PyTree, shapes: PyTree) -> PyTree:
    """Converts entries by layer to the form of the model, placed as `shapes` says."""
    scanned = as_scanned(self._model, tree, stack=_to_devices)
    return jax.device_put(scanned, jax.tree.map(lambda leaf: leaf.sharding, shapes))

  def restore_params(
      self, shapes: Params, which: str, weights: str = "raw"
  ) -> tuple[int, Params, str]:
    """Restores the parameters alone, for evaluation and sampling.

    A run that is training may delete a checkpoint while it is read, and one may be damaged.
    "latest" and "best" then take the next that can be read, and log which.

    Args:
      shapes: the parameters' shapes and shardings.
      which: "latest", "best" (the lowest finite held-out loss) or a step's number.
      weights: "raw" for the parameters that were trained, "ema" for their average, or "auto" for
        the average if the checkpoint has one.

    Returns:
      The step, the parameters, and "raw" or "ema".

    Raises:
      InputError: there is no such checkpoint, none that can be read, or no average in it.
    """
    layers = ocp.args.StandardRestore(_on_hosts(by_layer(self._model, shapes)))
    failed: dict[int, InputError] = {}
    while len(failed) < _MOST_TRIED:
      candidates = [step for step in self._candidates(which) if step not in failed]
      if not candidates:
        break
      step = candidates[0]
      has_ema = weights != "raw" and self._has_ema(step)
      if weights == _EMA and not has_ema:
        raise invalid("--weights", weights, f"raw or no value: checkpoint {step} in {self._folder} "
                      "has no average of parameters, as config.train.ema was 0")
      item = _EMA if has_ema else "params"
      try:
        params = self._read(step, ocp.args.Composite(**{item: layers}))[item]
      except InputError as error:
        failed[step] = error
        _retried(self._manager.reload)  # Another process may have saved and deleted meanwhile.
        continue
      for why_not in failed.values():
        _LOG.warning("%s; checkpoint %d is taken", why_not, step)
      return step, self._join(params, shapes), _EMA if has_ema else "raw"
    if failed:
      raise [*failed.values()][-1]
    steps = self._manager.all_steps()
    known = ", ".join(map(str, sorted(steps))) or "(there are none)"
    why = ": none of them has a finite held-out loss" if which == "best" and steps else ""
    raise InputError(
        f"checkpoint {which!r} is not in {self._folder}: expected latest, best or one of "
        f"the steps {known}{why}"
    )

  def _candidates(self, which: str) -> list[int]:
    """Returns the steps that `which` (see `restore_params`) can mean, the first choice first."""
    steps = sorted(self._manager.all_steps(), reverse=True)
    if which == "latest":
      return steps
    if which != "best":
      return [step for step in steps if str(step) == which]
    ranks = {step: self._rank(step) for step in steps}
    # `sorted` is stable: of equal losses, the newest comes first.
    return sorted((step for step in steps if ranks[step] < math.inf), key=ranks.__getitem__)

  def _rank(self, step: int) -> float:
    """Returns the held-out loss of a checkpoint; infinity if it has no finite one."""
    metrics = self._manager.metrics(step)
    return math.inf if metrics is None else _loss(metrics)

  def _read(self, step: int, arguments: Any) -> Any:
    try:
      return self._manager.restore(step, args=arguments)
    except jax.errors.JaxRuntimeError:  # A device's error, such as a lack of memory.
      raise
    except Exception as error:  # Orbax has no class for errors of reading.
      reason = str(error).strip().partition("\n")[0][:200]
      raise InputError(
          f"checkpoint {step} in {self._folder} cannot be read: it is damaged, was deleted just "
          f"now, or is of another model ({reason}). Others there: "
          f"{', '.join(str(s) for s in saved_steps(self._folder) if s != step) or 'none'} (without "
          "this one's folder, training goes on from the newest of them)"
      ) from error

  def wait(self) -> None:
    """Waits for the last save.

    Raises:
      Exception: the save failed.
    """
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and ends the threads, even if the save failed."""
    try:
      self.wait()
    finally:
      self._manager.close()


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
  """Returns a bool scalar: true if all floating-point numbers are finite."""
  finite = [
      jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


_HOST = "pinned_host"


def _to_hosts(leaf: jax.Array, rows: int) -> Sequence[jax.Array]:
  """Splits an array [R, ...] into R arrays with the sharding of a row, in the hosts' memory."""
  return _splitter(rows, row_sharding(leaf.sharding).with_memory_kind(_HOST))(leaf)


def _to_devices(leaves: Sequence[jax.Array]) -> jax.Array:
  """Inverts `_to_hosts`."""
  placed = stacked_sharding(leaves[0].sharding)
  return _stacker(placed.with_memory_kind("device"))(leaves)


# Cached, so that each shape and sharding is compiled once instead of once per leaf.
@functools.cache
def _splitter(rows: int, placed: jax.sharding.Sharding) -> Callable[..., Sequence[jax.Array]]:
  return jax.jit(functools.partial(split_rows, rows=rows), out_shardings=placed)


@functools.cache
def _stacker(placed: jax.sharding.Sharding) -> Callable[..., jax.Array]:
  return jax.jit(stack_rows, out_shardings=placed)


def _on_hosts(shapes: PyTree) -> PyTree:
  """Returns the same shapes and shardings in the memory of the devices' hosts."""
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(_HOST)
      ),
      shapes,
  )


def placed_on(params: Params, device: jax.sharding.Sharding) -> Params:
  """Returns the shapes of `params`, to be restored onto `device`."""
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), params
  )
