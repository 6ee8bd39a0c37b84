"""The matrix-state recurrence as a plain float32 `lax.scan`: the specification.

Decoding runs the one-step functions of this file. Every faster form is tested against it:
outputs, final states and gradients, that of the initial state included. `resets_BT` is bool, true
where the state is cleared before the token; None means never.
Letters: `dense_jax.types`.
"""

import jax.numpy as jnp

from dense_jax.ops.reference import scan_states
from dense_jax.types import Array


def _per_head(x_BJN: Array, heads: int) -> Array:
  """Repeats what a group shares for each of its heads; float32."""
  return jnp.repeat(x_BJN.astype(jnp.float32), heads // x_BJN.shape[1], axis=1)


def matrix_step(h_BHPN: Array, log_decay_BH: Array, k_BJN: Array, v_BHP: Array) -> Array:
  """Computes one step of the matrix-state recurrence (arXiv 2307.08621, equation 6).

  Args:
    h_BHPN: float32 state.
    log_decay_BH: float32, log of the decay, <= 0; its B may be 1.
    k_BJN: the key; head h uses that of group h // (H / J).
    v_BHP: the value.

  Returns:
    The next state, float32: exp(log_decay) h + v k^T.
  """
  k_BHN = _per_head(k_BJN, v_BHP.shape[1])
  kv_BHPN = v_BHP.astype(jnp.float32)[..., None] * k_BHN[:, :, None, :]
  return jnp.exp(log_decay_BH)[..., None, None] * h_BHPN + kv_BHPN


def matrix_read(h_BHPN: Array, q_BJN: Array) -> Array:
  """Computes the read y_BHP = h q, float32."""
  return jnp.einsum("bhpn,bhn->bhp", h_BHPN, _per_head(q_BJN, h_BHPN.shape[1]))


def matrix_states(
    k_BTJN: Array,
    v_BTHP: Array,
    log_decay_BTH: Array,
    resets_BT: Array | None,
    initial_BHPN: Array,
) -> tuple[Array, Array]:
  """Computes all states h_BTHPN of the matrix-state recurrence, and the last, h_BHPN; float32."""

  def step(h: Array, k_BJN: Array, v_BHP: Array, log_decay_BH: Array) -> Array:
    return matrix_step(h, log_decay_BH, k_BJN, v_BHP)

  return scan_states(step, initial_BHPN, (k_BTJN, v_BTHP, log_decay_BTH), resets_BT)
