"""The plain `lax.scan` behind the specification of every recurrence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dense_jax.types import Array, PyTree


def scan_states(
    step: Callable[..., Array], initial: Array, inputs: PyTree, resets_BT: Array | None
) -> tuple[Array, Array]:
  """Runs h_t = step(h_{t-1}, *inputs_t) over axis 1.

  Args:
    step: one step, on arrays without the time axis.
    initial: the state before the first token, [B, ...].
    inputs: arrays [B, T, ...].
    resets_BT: bool, true where the state is cleared before the token; None means never.

  Returns:
    All states, [B, T, ...], and the last one, [B, ...].
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
