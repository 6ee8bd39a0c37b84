"""Checkpoints: parameters, optimizer, step and data position, by orbax."""

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dense_jax.files import is_remote
from dense_jax.training.step import TrainState
from dense_jax.types import InputError, Params

HELDOUT_LOSS = "heldout_loss"


def _manager(
    folder: epath.Path, keep_last: int, keep_best: int, read_only: bool
) -> ocp.CheckpointManager:
  preserve: list[Any] = [policies.LatestN(keep_last)]
  if keep_best:
    preserve.append(
        policies.BestN(
            get_metric_fn=lambda metrics: metrics[HELDOUT_LOSS],
            reverse=True,  # The lowest loss is the best.
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
    )
  options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(preserve),
      best_fn=lambda metrics: metrics[HELDOUT_LOSS],
      best_mode="min",
      enable_async_checkpointing=True,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
  )
  return ocp.CheckpointManager(folder, options=options)


class Checkpoints:
  """A run's checkpoints. Saving is asynchronous, and a checkpoint is whole or absent.

  Kept are the newest `keep_last` and the best `keep_best` by held-out loss.
  """

  def __init__(
      self, folder: epath.Path, *, keep_last: int = 1, keep_best: int = 0,
      read_only: bool = False,
  ) -> None:
    self._folder = folder if is_remote(folder) else folder.absolute()
    self._manager = _manager(self._folder, keep_last, keep_best, read_only)

  @property
  def latest(self) -> int | None:
    """The newest checkpoint's step."""
    return self._manager.latest_step()

  def save(
      self, state: TrainState, step: int, data: Mapping[str, Any], heldout_loss: float | None
  ) -> None:
    """Starts saving; the state's values are copied before it returns.

    Args:
      state: the state after `step` updates.
      step: its step.
      data: the data's position, as JSON has it.
      heldout_loss: mean nats a token, by which checkpoints are ranked; None if unknown.
    """
    if self._manager.latest_step() == step:
      return
    self._manager.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"step": state.step, "optimizer": state.opt_state}),
            data=ocp.args.JsonSave(dict(data)),
        ),
        metrics=None if heldout_loss is None else {HELDOUT_LOSS: heldout_loss},
        force=True,
    )

  def restore(self, shapes: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state of a step, placed as `shapes` says, and the data's position."""
    restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(shapes.params),
            optimizer=ocp.args.StandardRestore(
                {"step": shapes.step, "optimizer": shapes.opt_state}
            ),
            data=ocp.args.JsonRestore(),
        ),
    )
    rest = restored["optimizer"]
    state = TrainState(rest["step"], restored["params"], rest["optimizer"])
    return state, restored["data"]

  def restore_params(self, shapes: Params, which: str) -> tuple[int, Params]:
    """A step and its parameters, for evaluation and sampling.

    Args:
      shapes: the parameters' shapes (and shardings).
      which: "latest", "best" (by held-out loss) or a step's number.

    Raises:
      InputError: there is no such checkpoint.
    """
    steps = sorted(self._manager.all_steps())
    wanted: int | None
    if which in ("latest", "best"):
      wanted = self._manager.latest_step() if which == "latest" else self._manager.best_step()
    else:
      wanted = int(which) if which.isdigit() else None
    if wanted not in steps:
      raise InputError(
          f"checkpoint {which!r} is not in {self._folder}: expected latest, best or one of "
          f"the steps {', '.join(map(str, steps)) or '(there are none)'}"
      )
    restored = self._manager.restore(
        wanted, args=ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
    )
    return int(wanted or 0), restored["params"]

  def close(self) -> None:
    """Waits for the last save."""
    self._manager.wait_until_finished()
    self._manager.close()


def placed_on(params: Params, device: jax.sharding.Sharding) -> Params:
  """Shapes of `params`, to be restored onto `device`."""
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), params
  )
