"""Checkpoints: parameters, optimizer, step and data position, by orbax.

A checkpoint has one entry a layer, `layers.<N>.<rest>`, for a parameter and its moments
(`dense_jax.models.params.by_layer`). How layers were scanned is not in it, so that a run may go
on with another `block_layers`. Stacked arrays are cut on the way from the devices to the memory
of their hosts, and stacked on the way back: no device holds a second copy of the state.
"""

import contextlib
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
from dense_jax.files import is_remote
from dense_jax.models.params import (
    as_scanned,
    by_layer,
    row_sharding,
    split_rows,
    stack_rows,
    stacked_sharding,
)
from dense_jax.training.step import TrainState
from dense_jax.types import Params, PyTree

T = TypeVar("T")

HELDOUT_LOSS = "heldout_loss"
# A run may save faster than another process reads.
_MOST_TRIED = 20
_LOG = logging.getLogger(__name__)


def check_name(folder: epath.Path, field: str) -> None:
  """Refuses a folder in which checkpoints could be written but not read again.

  The libraries below take [...] for a pattern and a backslash for a slash, in any part of the
  absolute path, and know no bytes that are not UTF-8.

  Raises:
    InputError: naming `field` and the whole path.
  """
  path = os.fspath(folder if is_remote(folder) else folder.absolute())
  # A surrogate stands for a byte that is not UTF-8.
  if re.search(r"\\|\[.*\]|[\ud800-\udfff]", path, re.DOTALL):
    raise invalid(
        field, path, "a path (with the current folder's, where it is relative) without "
        "[...], backslashes and bytes that are not UTF-8, as checkpoints there could not be read",
    )


def saved_steps(folder: epath.Path) -> list[int]:
  """The steps of the whole checkpoints in a folder, in order; nothing is changed there."""
  if not folder.is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(folder))


def _loss(metrics: Mapping[str, float]) -> float:
  """What checkpoints are ranked by; a loss that is not finite is behind all others."""
  loss = metrics[HELDOUT_LOSS]
  return loss if math.isfinite(loss) else math.inf


class _Manager(ocp.CheckpointManager):
  """Orbax's, which one unreadable held-out loss would keep from opening any of the checkpoints."""

  def metrics(self, step: int) -> Mapping[str, float] | None:
    """The metrics that were saved with a step; None where there are none that can be read."""
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
  """Its result; it is done again where another process deleted what it was about to look at."""
  for _ in range(_MOST_TRIED):
    with contextlib.suppress(FileNotFoundError):
      return action()
  return action()


class Checkpoints:
  """A run's checkpoints. Saving is asynchronous, and a checkpoint is whole or absent.

  Kept are the newest `keep_last` and the best `keep_best` by held-out loss.

  Args:
    folder: where they are, or will be.
    model: the model's configuration, which says how its layers are scanned now.
    keep_last: the number of newest checkpoints that are kept.
    keep_best: the number of best ones that are kept beside them.
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
    """The newest checkpoint's step."""
    return self._manager.latest_step()

  def save(
      self, state: TrainState, step: int, data: Mapping[str, Any], heldout_loss: float | None
  ) -> bool:
    """Starts saving; the state's values are copied before it returns.

    Args:
      state: the state after `step` updates.
      step: its step.
      data: the data's position, as JSON has it.
      heldout_loss: mean nats a token, by which checkpoints are ranked; None if unknown. One that
        is not finite ranks nothing.

    Returns:
      Whether the step is, or will be, saved. It is not where a number of the state is not finite:
      no later step would be better, and the checkpoint would push out one that is whole.
    """
    if self._manager.latest_step() == step:
      return True
    if not distributed.to_host(_all_finite((state.params, state.opt_state))):
      return False
    state = by_layer(self._model, state, split=_to_hosts)
    ranked = heldout_loss is not None and math.isfinite(heldout_loss)
    self._manager.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"step": state.step, "optimizer": state.opt_state}),
            data=ocp.args.JsonSave(dict(data)),
        ),
        metrics={HELDOUT_LOSS: heldout_loss} if ranked else None,
        force=True,
    )
    return True

  def restore(self, shapes: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state of a step, placed as `shapes` says, and the data's position.

    Raises:
      InputError: a part of the checkpoint is missing, damaged, or of another form.
    """
    layers = _on_hosts(by_layer(self._model, shapes))
    restored = self._read(
        step,
        ocp.args.Composite(
            params=ocp.args.StandardRestore(layers.params),
            optimizer=ocp.args.StandardRestore(
                {"step": layers.step, "optimizer": layers.opt_state}
            ),
            data=ocp.args.JsonRestore(),
        ),
    )
    rest = restored["optimizer"]
    state = TrainState(rest["step"], restored["params"], rest["optimizer"])
    return self._join(state, shapes), restored["data"]

  def _join(self, tree: PyTree, shapes: PyTree) -> PyTree:
    """Entries of layers as the model has them, placed as `shapes` says."""
    scanned = as_scanned(self._model, tree, stack=_to_devices)
    return jax.device_put(scanned, jax.tree.map(lambda leaf: leaf.sharding, shapes))

  def restore_params(self, shapes: Params, which: str) -> tuple[int, Params]:
    """A step and its parameters, for evaluation and sampling.

    A run that is training may delete a checkpoint while it is read, and one may be damaged:
    "latest" and "best" then take the next one that can be read, and log which.

    Args:
      shapes: the parameters' shapes and shardings.
      which: "latest", "best" (by held-out loss, if it is finite) or a step's number.

    Raises:
      InputError: there is no such checkpoint, or none that can be read.
    """
    layers = _on_hosts(by_layer(self._model, shapes))
    arguments = ocp.args.Composite(params=ocp.args.StandardRestore(layers))
    failed: dict[int, InputError] = {}
    while len(failed) < _MOST_TRIED:
      candidates = [step for step in self._candidates(which) if step not in failed]
      if not candidates:
        break
      step = candidates[0]
      try:
        params = self._read(step, arguments)["params"]
      except InputError as error:
        failed[step] = error
        _retried(self._manager.reload)  # Another process may have saved and deleted meanwhile.
        continue
      for why_not in failed.values():
        _LOG.warning("%s; checkpoint %d is taken", why_not, step)
      return step, self._join(params, shapes)
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
    """The steps that "latest", "best" or a step's number can mean, the first choice first."""
    steps = sorted(self._manager.all_steps(), reverse=True)
    if which == "latest":
      return steps
    if which != "best":
      return [step for step in steps if str(step) == which]
    ranks = {step: self._rank(step) for step in steps}
    # Of equal ones the newest, as `sorted` keeps their order.
    return sorted((step for step in steps if ranks[step] < math.inf), key=ranks.__getitem__)

  def _rank(self, step: int) -> float:
    """The held-out loss of a checkpoint; infinite where it has none that is finite."""
    metrics = self._manager.metrics(step)
    return math.inf if metrics is None else _loss(metrics)

  def _read(self, step: int, arguments: Any) -> Any:
    try:
      return self._manager.restore(step, args=arguments)
    except jax.errors.JaxRuntimeError:  # Of a device, such as its memory.
      raise
    except Exception as error:  # Orbax has no kind of error of its own for what it cannot read.
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
      Exception: it failed.
    """
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save, and ends the threads, also where it failed."""
    try:
      self.wait()
    finally:
      self._manager.close()


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
  """Whether all numbers are: a bool scalar."""
  finite = [
      jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


_HOST = "pinned_host"


def _to_hosts(leaf: jax.Array, rows: int) -> Sequence[jax.Array]:
  """Cuts an array [R, ...] into R, which have its sharding in the hosts' memory."""
  return _splitter(rows, row_sharding(leaf.sharding).with_memory_kind(_HOST))(leaf)


def _to_devices(leaves: Sequence[jax.Array]) -> jax.Array:
  """Inverts `_to_hosts`."""
  placed = stacked_sharding(leaves[0].sharding)
  return _stacker(placed.with_memory_kind("device"))(leaves)


# Compiled once for each shape and sharding, not once for each leaf.
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
  """Returns shapes of `params`, to be restored onto `device`."""
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), params
  )
