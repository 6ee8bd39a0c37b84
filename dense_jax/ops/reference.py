"""The plain scan that the specifications of all recurrences run."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dense_jax.types import Array, PyTree


def scan_states(
    step: Callable[..., Array], initial: Array, inputs: PyTree, resets_BT: Array | None
) -> tuple[Array, Array]:
  """Runs `step(h, *inputs_t)` over axis 1, clearing the state where `resets_BT` says so.

  Returns:
    All states, [B, T, ...], and the last.
  """
  time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, resets_BT))

  def body(h: Array, xs: PyTree) -> tuple[Array, Array]:
    inputs_t, reset_B = xs
    if reset_B is not None:
      h = jnp.where(reset_B.reshape(-1, *(1,) * (h.ndim - 1)), 0.0, h)
    h = step(h, *inputs_t)
    return h, h

  final, states = jax.lax.scan(body, initial, time_first)
  return jnp.moveaxis(states, 0, 1), final
