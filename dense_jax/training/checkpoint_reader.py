"""Restores checkpoints onto any devices, and proves that they are what was saved.

Of several processes, all restore the same checkpoint or none does.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from etils import epath

from dense_jax import distributed
from dense_jax.config import ModelConfig, invalid
from dense_jax.errors import InputError
from dense_jax.files import is_remote
from dense_jax.models.params import as_scanned, by_layer
from dense_jax.training import guard, stored
from dense_jax.training.host_arrays import on_hosts, to_devices
from dense_jax.training.proof import Proof, prove
from dense_jax.training.step import TrainState
from dense_jax.training.stored import (
  EMA,
  PARAMS,
  DamagedError,
  Stored,
  UnreadableError,
  saved_steps,
)
from dense_jax.types import Params, PyTree

T = TypeVar("T")

# The most attempts to read, in case a run saves and deletes faster than this process reads.
_MOST_TRIED = 20
_LOG = logging.getLogger(__name__)


def ranking_loss(checkpoint: Stored) -> float | None:
  """Returns the finite held-out loss of a checkpoint; None if it has none, or none can be read."""
  try:
    return checkpoint.loss(checkpoint.proof())
  except DamagedError as error:
    _LOG.warning("%s; it ranks nothing", error)
    return None


def _agreed(action: Callable[[], T]) -> T:
  """Returns the action's result where it succeeds in all processes.

  Raises:
    InputError: the action raised one in some process; it is raised in all.
  """
  error = None
  try:
    result = action()
  except InputError as raised:
    error = raised
    if jax.process_count() > 1:
      _LOG.warning("%s", error)
  if distributed.any_process(error is not None):
    raise error or UnreadableError("another process cannot read its part of it, and says why")
  return result


class CheckpointReader:
  """The checkpoints in a folder, to be read; nothing there is changed.

  Args:
    folder: where the checkpoints are or will be.
    model: the model's configuration, which says how its layers are scanned now.
  """

  def __init__(self, folder: epath.Path, model: ModelConfig) -> None:
    self._folder = folder if is_remote(folder) else folder.absolute()
    self._model = model

  def steps(self) -> list[int]:
    """Returns the steps of the checkpoints, in order."""
    return saved_steps(self._folder)

  @property
  def latest(self) -> int | None:
    """The newest checkpoint's step; None means that there is no checkpoint."""
    return max(self.steps(), default=None)

  def restore(self, shapes: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """Restores a step; returns its state, placed as `shapes` says, and the data's position.

    If `shapes` has an average of the parameters and the checkpoint has none, the average begins
    with the parameters. An average for which `shapes` has no place is not read. The same holds for
    the guard, whose state begins with nothing skipped.

    Raises:
      DamagedError: a part of the checkpoint is missing, damaged or not finite.
      UnfitError: it holds other arrays.
    """
    checkpoint = Stored(self._folder, step)
    proof = _agreed(checkpoint.proof)
    has_ema = shapes.ema is not None and checkpoint.has(EMA, proof)
    wanted = shapes if has_ema else dataclasses.replace(shapes, ema=None)
    read = self._read_proven(checkpoint, proof, state_items(wanted))
    position = _agreed(lambda: checkpoint.position(proof))
    judged = guard.from_json(shapes.guard, position.pop(stored.GUARD, {}))
    rest = read[stored.OPTIMIZER]
    checkpoint.check_steps(int(rest["step"]), position)
    state = TrainState(rest["step"], read[PARAMS], rest["optimizer"], read.get(EMA), judged)
    if shapes.ema is not None and not has_ema:
      state = dataclasses.replace(state, ema=jax.tree.map(jnp.copy, state.params))
    return state, position

  def _read_proven(
      self, checkpoint: Stored, proof: Proof | None, items: Mapping[str, PyTree]
  ) -> dict[str, PyTree]:
    """Reads items onto the devices, and compares them with the proof, in all processes alike.

    Args:
      checkpoint: where they are.
      proof: what they were; None means that only numbers that are not finite are found.
      items: item -> tree of shapes and shardings, with layers as the model scans them. Arrays
        are read in the dtype that they were saved in, and rounded to that of the shapes.
    """
    if proof is None:
      _LOG.warning("checkpoint %d in %s was saved without digests: that it is what was saved could "
                   "not be proven", checkpoint.step, self._folder)
    layers = by_layer(self._model, dict(items))
    _agreed(lambda: checkpoint.check_fits(layers, proof))
    as_saved = checkpoint.with_saved_dtypes(on_hosts(layers), proof)
    read = _agreed(lambda: self._read(checkpoint.step, as_saved))
    scanned = as_scanned(self._model, read, stack=to_devices)
    placed = jax.device_put(scanned, jax.tree.map(lambda leaf: leaf.sharding, dict(items)))
    checkpoint.check(proof, *prove(placed, self._model))
    return jax.tree.map(
        lambda leaf, shape: leaf if leaf.dtype == shape.dtype else leaf.astype(shape.dtype),
        placed, dict(items),
    )

  def _read(self, step: int, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return Stored(self._folder, step).read(items)

  def restore_params(
      self, shapes: Params, which: str, weights: str = "raw"
  ) -> tuple[int, Params, str]:
    """Restores the parameters alone, for evaluation and sampling.

    A run that is training may delete a checkpoint while it is read, and files of one may be
    missing. "latest" and "best" then take the next that can be read, and log which.

    Args:
      shapes: the parameters' shapes and shardings.
      which: "latest", "best" (the lowest finite held-out loss) or a step's number.
      weights: "raw" for the parameters that were trained, "ema" for their average, or "auto" for
        the average if the checkpoint has one.

    Returns:
      The step, the parameters, and "raw" or "ema".

    Raises:
      InputError: there is no such checkpoint, none that can be read, no average in it, or its
        arrays are not what was saved.
    """
    failed: dict[int, InputError] = {}
    while len(failed) < _MOST_TRIED:
      candidates = [step for step in self._candidates(which) if step not in failed]
      if not candidates:
        break
      step = candidates[0]
      checkpoint = Stored(self._folder, step)
      try:
        proof = _agreed(checkpoint.proof)
        has_ema = weights != "raw" and checkpoint.has(EMA, proof)
        if weights == EMA and not has_ema:
          raise invalid("--weights", weights, f"raw or no value: checkpoint {step} in "
                        f"{self._folder} has no average of parameters, as config.train.ema was 0")
        item = EMA if has_ema else PARAMS
        params = self._read_proven(checkpoint, proof, {item: shapes})[item]
      except UnreadableError as error:
        failed[step] = InputError(str(error))  # Without its traceback, which keeps arrays.
        continue
      for why_not in failed.values():
        _LOG.warning("%s; checkpoint %d is taken", why_not, step)
      return step, params, EMA if has_ema else "raw"
    if failed:
      raise [*failed.values()][-1]
    steps = self.steps()
    known = ", ".join(map(str, sorted(steps))) or "(there are none)"
    why = ": none of them has a finite held-out loss" if which == "best" and steps else ""
    raise InputError(
        f"checkpoint {which!r} is not in {self._folder}: expected latest, best or one of "
        f"the steps {known}{why}"
    )

  def _candidates(self, which: str) -> list[int]:
    """Returns the steps that `which` (see `restore_params`) can mean, the first choice first."""
    steps = sorted(self.steps(), reverse=True)
    if which == "latest":
      return steps
    if which != "best":
      return [step for step in steps if str(step) == which]
    losses = {step: ranking_loss(Stored(self._folder, step)) for step in steps}
    ranked = [(loss, step) for step, loss in losses.items() if loss is not None]
    # Of equal losses, the newest comes first.
    return [step for _, step in sorted(ranked, key=lambda pair: (pair[0], -pair[1]))]


def state_items(state: TrainState) -> dict[str, PyTree]:
  """Returns the trees of a state, or of its shapes, by the items of a checkpoint."""
  return {
      PARAMS: state.params,
      stored.OPTIMIZER: {"step": state.step, "optimizer": state.opt_state},
      **({} if state.ema is None else {EMA: state.ema}),
  }
