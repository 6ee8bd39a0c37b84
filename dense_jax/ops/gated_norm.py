"""The norm of each head and an output gate, with gradients that read each array once."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dense_jax.types import Array

Repeat = Callable[[Array, int], Array]


def gated_norm(
    y_E: Array, gate_E: Array, factor_H: Array, added_H: Array | None,
    repeat: Repeat,
) -> Array:
  """Computes (y factor + added) silu(gate), in float32, rounded once to the gate's dtype.

  JAX's own gradients would read y, the gate and the result's gradient several times, and keep a
  product of them. No forward-mode derivatives.

  Args:
    y_E: [..., E], a layer's read.
    gate_E: [..., E], the gate before its activation.
    factor_H: [..., H], float32, what each head is multiplied by.
    added_H: [..., H], float32, what is added to each head then; None means 0.
    repeat: `broadcast_heads`, or an equivalent for the platform.
  """
  # Small arrays, which the compiler would otherwise compute again for each channel.
  factor_H, added_H = jax.lax.optimization_barrier((factor_H, added_H))
  return _gated_norm(repeat, y_E, gate_E, factor_H, added_H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_norm(
    repeat: Repeat, y_E: Array, gate_E: Array, factor_H: Array, added_H: Array | None
) -> Array:
  y_E = _normed(repeat, y_E, factor_H, added_H)
  return (y_E * jax.nn.silu(gate_E.astype(jnp.float32))).astype(gate_E.dtype)


def _normed(repeat: Repeat, y_E: Array, factor_H: Array, added_H: Array | None) -> Array:
  channels = y_E.shape[-1] // factor_H.shape[-1]
  y_E = y_E.astype(jnp.float32) * repeat(factor_H, channels)
  return y_E if added_H is None else y_E + repeat(added_H, channels)


_Inputs = tuple[Array, Array, Array, Array | None]


def _forward(
    repeat: Repeat, y_E: Array, gate_E: Array, factor_H: Array, added_H: Array | None
) -> tuple[Array, _Inputs]:
  inputs = y_E, gate_E, factor_H, added_H
  return _gated_norm(repeat, *inputs), inputs


def _backward(repeat: Repeat, inputs: _Inputs, d_E: Array) -> _Inputs:
  y_E, gate_E, factor_H, added_H = inputs
  channels = y_E.shape[-1] // factor_H.shape[-1]
  d_E = d_E.astype(jnp.float32)
  gate32_E = gate_E.astype(jnp.float32)
  active_E = jax.nn.sigmoid(gate32_E)
  normed_E = _normed(repeat, y_E, factor_H, added_H)
  d_gate_E = d_E * normed_E * active_E * (1 + gate32_E * (1 - active_E))
  d_normed_E = d_E * gate32_E * active_E
  d_y_E = d_normed_E * repeat(factor_H, channels)

  def by_head(x_E: Array) -> Array:
    return jax.vjp(lambda x_H: repeat(x_H, channels), factor_H)[1](x_E)[0]

  return (
      d_y_E.astype(y_E.dtype), d_gate_E.astype(gate_E.dtype),
      by_head(d_normed_E * y_E.astype(jnp.float32)),
      None if added_H is None else by_head(d_normed_E),
  )


_gated_norm.defvjp(_forward, _backward)
