"""The selective diagonal recurrence as a plain float32 `lax.scan`: the specification.

Decoding runs the one-step functions of this file. Every faster form is tested against it:
outputs, final states and gradients, that of the initial state included. `resets_BT` is bool, true
where the state is cleared before the token; None means never.
Letters: `dense_jax.types`.
"""

import jax
import jax.numpy as jnp

from dense_jax.ops.reference import scan_states
from dense_jax.types import Array

# Reads are contractions because XLA's CPU backend computes a sum of products over N up to 60
# times as slowly if B is 1 (E 1024, N 16: 85 us a token against 1.5, two cores).
_HIGHEST = jax.lax.Precision.HIGHEST


def diagonal_step(a_BNE: Array, h_BNE: Array, dt_BE: Array, x_BE: Array, b_BN: Array) -> Array:
  """Computes one step of the selective diagonal recurrence (arXiv 2312.00752, equation 2a).

  Args:
    a_BNE: float32 continuous decay rates <= 0; its B may be 1. N comes before E so that the
      long axis fills vector lanes.
    h_BNE: float32 state.
    dt_BE: step sizes >= 0, computed with in float32.
    x_BE: the channels' inputs.
    b_BN: the input map.

  Returns:
    The next state, float32: exp(dt a) h + dt x b.
  """
  dt_BE = dt_BE.astype(jnp.float32)
  decay_BNE = jnp.exp(dt_BE[:, None, :] * a_BNE)
  u_BE = dt_BE * x_BE.astype(jnp.float32)
  return decay_BNE * h_BNE + u_BE[:, None, :] * b_BN.astype(jnp.float32)[:, :, None]


def diagonal_read(h_BNE: Array, c_BN: Array) -> Array:
  """Computes the read y_BE = sum over N of c h, float32."""
  return jnp.einsum("bne,bn->be", h_BNE, c_BN.astype(jnp.float32), precision=_HIGHEST)


def diagonal_states(
    dt_BTE: Array,
    a_NE: Array,
    x_BTE: Array,
    b_BTN: Array,
    resets_BT: Array | None,
    initial_BNE: Array,
) -> tuple[Array, Array]:
  """Computes all states h_BTNE of the selective recurrence, and the last, h_BNE; float32."""

  def step(h: Array, dt_BE: Array, x_BE: Array, b_BN: Array) -> Array:
    return diagonal_step(a_NE[None], h, dt_BE, x_BE, b_BN)

  return scan_states(step, initial_BNE, (dt_BTE, x_BTE, b_BTN), resets_BT)
