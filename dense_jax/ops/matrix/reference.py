"""The matrix-state recurrence as a plain float32 `lax.scan`: the specification.

The one-step functions are also what decoding runs. Every faster form is tested against this
file: outputs, final states and gradients. `resets_BT` (bool) clears the state before a token is
absorbed, and None never does; the initial state is as valid for the gradient as any other input.
Letters: `dense_jax.types`.
"""

import jax.numpy as jnp

from dense_jax.ops.reference import scan_states
from dense_jax.types import Array


def _per_head(x_BJN: Array, heads: int) -> Array:
  """Each head's copy of what its group shares; float32."""
  return jnp.repeat(x_BJN.astype(jnp.float32), heads // x_BJN.shape[1], axis=1)


def matrix_step(h_BHPN: Array, log_decay_BH: Array, k_BJN: Array, v_BHP: Array) -> Array:
  """One step of the matrix-state recurrence (retention, arXiv 2307.08621, equation 6).

  Args:
    h_BHPN: float32 state.
    log_decay_BH: float32, log of the decay, <= 0; its B may be 1.
    k_BJN: the key; head h takes that of group h // (H / J).
    v_BHP: the value.

  Returns:
    The next state, float32: exp(log_decay) h + v k^T.
  """
  k_BHN = _per_head(k_BJN, v_BHP.shape[1])
  kv_BHPN = v_BHP.astype(jnp.float32)[..., None] * k_BHN[:, :, None, :]
  return jnp.exp(log_decay_BH)[..., None, None] * h_BHPN + kv_BHPN


def matrix_read(h_BHPN: Array, q_BJN: Array) -> Array:
  """y_BHP = h q, float32."""
  return jnp.einsum("bhpn,bhn->bhp", h_BHPN, _per_head(q_BJN, h_BHPN.shape[1]))


def matrix_states(
    k_BTJN: Array,
    v_BTHP: Array,
    log_decay_BTH: Array,
    resets_BT: Array | None,
    initial_BHPN: Array,
) -> tuple[Array, Array]:
  """All states h_BTHPN of the matrix-state recurrence, and the last, float32."""

  def step(h: Array, k_BJN: Array, v_BHP: Array, log_decay_BH: Array) -> Array:
    return matrix_step(h, log_decay_BH, k_BJN, v_BHP)

  return scan_states(step, initial_BHPN, (k_BTJN, v_BTHP, log_decay_BTH), resets_BT)
