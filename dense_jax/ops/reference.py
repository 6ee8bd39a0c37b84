"""Every recurrence as a plain float32 `lax.scan`: the specification.

The one-step functions below are also what decoding runs. Every faster form is tested
against this file: outputs, final states and gradients. Letters: `dense_jax.types`.

All recurrences share one contract. `resets_BT` (bool) clears the state before a token is
absorbed; `initial` is the state before the first token, zero if None; both are as valid
for the gradient as any other input. Equation numbers are the design's:

    h_t = a_t h_{t-1} + u_t    (1)        y_t = C_t h_t    (2)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dense_jax.types import Array, PyTree

# Reads are contractions: XLA's CPU backend sums products over N up to 60 times as slowly where
# B is 1 (E 1024, N 16: 85 us a token against 1.5, two cores).
_HIGHEST = jax.lax.Precision.HIGHEST


def diagonal_step(a_BNE: Array, h_BNE: Array, dt_BE: Array, x_BE: Array, b_BN: Array) -> Array:
  """One step of the selective diagonal recurrence (arXiv 2312.00752, equation 2a).

  Args:
    a_BNE: float32 continuous decay rate <= 0; its B may be 1. N comes before E so that the
      long axis fills vector lanes.
    h_BNE: float32 state.
    dt_BE: float32 step size >= 0.
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
  """y_BE = sum over N of c h, float32."""
  return jnp.einsum("bne,bn->be", h_BNE, c_BN.astype(jnp.float32), precision=_HIGHEST)


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


def lti_step(h_BNE: Array, a_ENN: Array, b_EN: Array, x_BE: Array) -> Array:
  """One step of a time-invariant recurrence, each channel with its own dense system.

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
  """y_BE = sum over N of c h, float32."""
  return jnp.einsum("bne,en->be", h_BNE, c_EN.astype(jnp.float32), precision=_HIGHEST)


def _scan(
    step: Callable[..., Array], initial: Array, inputs: PyTree, resets_BT: Array | None
) -> tuple[Array, Array]:
  """Runs `step(h, *inputs_t)` over axis 1. Returns all states, time second, and the last."""
  time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, resets_BT))

  def body(h: Array, xs: PyTree) -> tuple[Array, Array]:
    inputs_t, reset_B = xs
    if reset_B is not None:
      h = jnp.where(reset_B.reshape(-1, *(1,) * (h.ndim - 1)), 0.0, h)
    h = step(h, *inputs_t)
    return h, h

  final, states = jax.lax.scan(body, initial, time_first)
  return jnp.moveaxis(states, 0, 1), final


def diagonal_states(
    dt_BTE: Array,
    a_NE: Array,
    x_BTE: Array,
    b_BTN: Array,
    resets_BT: Array | None,
    initial_BNE: Array,
) -> tuple[Array, Array]:
  """All states h_BTNE of the selective diagonal recurrence, and the last, float32."""

  def step(h: Array, dt_BE: Array, x_BE: Array, b_BN: Array) -> Array:
    return diagonal_step(a_NE[None], h, dt_BE, x_BE, b_BN)

  return _scan(step, initial_BNE, (dt_BTE, x_BTE, b_BTN), resets_BT)


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

  return _scan(step, initial_BHPN, (k_BTJN, v_BTHP, log_decay_BTH), resets_BT)


def lti_states(
    a_ENN: Array,
    b_EN: Array,
    x_BTE: Array,
    resets_BT: Array | None,
    initial_BNE: Array,
) -> tuple[Array, Array]:
  """All states h_BTNE of a time-invariant recurrence, and the last, float32."""

  def step(h: Array, x_BE: Array) -> Array:
    return lti_step(h, a_ENN, b_EN, x_BE)

  return _scan(step, initial_BNE, (x_BTE,), resets_BT)
