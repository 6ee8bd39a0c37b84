"""Decides on the device, without waiting for the host, which steps are taken and which are skipped.

A skipped step leaves parameters, optimizer and average as they were, and its batch is used up. One
number suffices to see whether any gradient is not finite: their norm, which clipping needs anyway.
After `guard.in_a_row` skipped steps nothing is taken any more until the host has looked, so that
the course of a run does not depend on how often it looks (`dense_jax.runs.guarding`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.config import GuardConfig
from dense_jax.types import Array, PyTree

# Names of the guard's metrics, which the host reads where it reads the loss.
SKIPPED, IN_A_ROW = "skipped_steps", "skipped_in_a_row"
# A deviation below this share of the mean counts as this share: where losses hardly differ, what
# is many of their deviations away is no spike yet.
_LEAST_DEVIATION = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recent:
  """The last steps that were taken, of which spikes are told apart.

  Attributes:
    count: int32 scalar, the steps that were taken since the window was empty.
    figures_FW: float32 [2, W], loss and gradient norm of the last W of them; step n is in column
      n mod W.
  """

  count: Array
  figures_FW: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
  """The part of a train state by which steps are judged.

  Attributes:
    skipped: int32 scalar, steps that were skipped in all.
    in_a_row: int32 scalar, those since the last step that was taken.
    recent: the window of spikes, if they are skipped.
  """

  skipped: Array
  in_a_row: Array
  recent: Recent | None = None


def begin(config: GuardConfig) -> GuardState | None:
  """Returns the state before the first step; None if no step is skipped, whatever happens."""
  if not config.is_on:
    return None
  recent = None
  if config.skip == "spikes":
    recent = Recent(jnp.zeros((), jnp.int32), jnp.zeros((2, config.window), jnp.float32))
  return GuardState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), recent)


def judge(
    config: GuardConfig, guard: GuardState, loss: Array, grad_norm: Array
) -> tuple[Array, GuardState]:
  """Decides about a step.

  Args:
    config: the guard's configuration.
    guard: the state before the step.
    loss: the batch's loss, float32 scalar.
    grad_norm: the norm of all gradients, float32 scalar.

  Returns:
    A bool scalar, true if the step is to be taken; and the state after the step.
  """
  taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (guard.in_a_row < config.in_a_row)
  recent = guard.recent
  if recent is not None:
    figures_F = jnp.stack([loss, grad_norm])
    taken &= ~_is_spike(config, recent, figures_F)
    column = recent.figures_FW.at[:, recent.count % config.window].set(figures_F)
    recent = Recent(
        recent.count + taken, jnp.where(taken, column, recent.figures_FW)
    )
  skipped = 1 - taken.astype(jnp.int32)
  return taken, GuardState(guard.skipped + skipped, skipped * (guard.in_a_row + 1), recent)


def _is_spike(config: GuardConfig, recent: Recent, figures_F: Array) -> Array:
  """Returns whether loss or norm is `sigmas` deviations above the mean of a full window."""
  mean_F = jnp.mean(recent.figures_FW, axis=1)
  spread_F = jnp.std(recent.figures_FW, axis=1)
  sigma_F = jnp.maximum(spread_F, _LEAST_DEVIATION * jnp.abs(mean_F))
  above = jnp.any(figures_F > mean_F + config.sigmas * sigma_F)
  return above & (recent.count >= config.window)


def keep(taken: Array, new: PyTree, old: PyTree) -> PyTree:
  """Returns `new` for a step that is taken, and `old` for one that is skipped."""
  return jax.tree.map(lambda after, before: jnp.where(taken, after, before), new, old)


def metrics(guard: GuardState) -> dict[str, Array]:
  """Returns the numbers that a step reports, float32 scalars."""
  return {
      SKIPPED: guard.skipped.astype(jnp.float32), IN_A_ROW: guard.in_a_row.astype(jnp.float32)
  }


def as_json(guard: GuardState) -> dict[str, Any]:
  """Returns a state as JSON values, from which `from_json` makes the same bits.

  Waits for the step that makes it.
  """
  values = {"skipped": int(guard.skipped), "in_a_row": int(guard.in_a_row)}
  if guard.recent is None:
    return values
  return {**values, "count": int(guard.recent.count),
          "figures": np.asarray(guard.recent.figures_FW).tolist()}


def from_json(shapes: GuardState | None, values: Mapping[str, Any]) -> GuardState | None:
  """Inverts `as_json`.

  Args:
    shapes: the state's shapes and shardings; None makes none.
    values: what `as_json` returned. What it lacks is zero: a run that was saved without a guard
      goes on as one that has skipped nothing, and a window of another size begins anew.
  """
  if shapes is None:
    return None
  recent = None
  # Any: the fields are annotated as jax arrays, and these are numpy's until they are placed.
  count: Any = np.int32(values.get("count", 0))
  figures_FW: Any = np.asarray(values.get("figures", ()), np.float32)
  if shapes.recent is not None:
    shape = shapes.recent.figures_FW.shape
    if figures_FW.shape != shape:
      count, figures_FW = np.int32(0), np.zeros(shape, np.float32)
    recent = Recent(count, figures_FW)
  skipped: Any = np.int32(values.get("skipped", 0))
  in_a_row: Any = np.int32(values.get("in_a_row", 0))
  state = GuardState(skipped, in_a_row, recent)
  return jax.tree.map(lambda leaf, placed: jax.device_put(leaf, placed.sharding), state, shapes)
