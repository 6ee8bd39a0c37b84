"""The time-invariant recurrence with dense matrices as a float32 `lax.scan`: the specification.

Decoding reads with `lti_read`. Every faster form is tested against this file: outputs, final
states and gradients, that of the initial state included. `resets_BT` is bool, true where the state
is cleared before the token; None means never.
Letters: `dense_jax.types`.
"""

import jax
import jax.numpy as jnp

from dense_jax.ops.reference import scan_states
from dense_jax.types import Array

# Reads are contractions because XLA's CPU backend computes a sum of products over N up to 60
# times as slowly if B is 1 (E 1024, N 16: 85 us a token against 1.5, two cores).
_HIGHEST = jax.lax.Precision.HIGHEST


def lti_step(h_BNE: Array, a_ENN: Array, b_EN: Array, x_BE: Array) -> Array:
  """Computes one step of a time-invariant recurrence, a dense system per channel.

  Args:
    h_BNE: float32 state.
    a_ENN: float32 discrete transition.
    b_EN: float32 discrete input map.
    x_BE: the channels' inputs.

  Returns:
    The next state, float32: A h + b x.
  """
  u_BNE = b_EN.T[None] * x_BE.astype(jnp.float32)[:, None, :]
  return jnp.einsum("enk,bke->bne", a_ENN, h_BNE, precision=_HIGHEST) + u_BNE


def lti_read(h_BNE: Array, c_EN: Array) -> Array:
  """Computes the read y_BE = sum over N of c h, float32."""
  return jnp.einsum("bne,en->be", h_BNE, c_EN.astype(jnp.float32), precision=_HIGHEST)


def lti_states(
    a_ENN: Array,
    b_EN: Array,
    x_BTE: Array,
    resets_BT: Array | None,
    initial_BNE: Array,
) -> tuple[Array, Array]:
  """Computes all states h_BTNE of a time-invariant recurrence, and the last, h_BNE; float32."""

  def step(h: Array, x_BE: Array) -> Array:
    return lti_step(h, a_ENN, b_EN, x_BE)

  return scan_states(step, initial_BNE, (x_BTE,), resets_BT)
