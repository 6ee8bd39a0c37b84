"""Numbers of each head, repeated for its channels."""

import functools

import jax
import jax.numpy as jnp

from dense_jax.types import Array


def broadcast_heads(x_H: Array, channels: int) -> Array:
  """Repeats each head's number for all its channels, [..., H] -> [..., H * P].

  Args:
    x_H: numbers of H heads.
    channels: P.
  """
  x_HP = jnp.broadcast_to(x_H[..., None], (*x_H.shape, channels))
  return x_HP.reshape(*x_H.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat_heads(x_H: Array, channels: int) -> Array:
  """Computes `broadcast_heads` without arrays that have an axis of heads, for TPUs.

  On a TPU an array [..., H, P] has other tiles than [..., H * P], so that a reshape of one to the
  other is a copy. The selections here, and the sums over parts of the last axis in the gradient,
  are parts of whatever reads or makes the array. No forward-mode derivatives.

  Args:
    x_H: numbers of H heads; a few, as each costs a selection.
    channels: P.
  """
  heads = x_H.shape[-1]
  head = jax.lax.broadcasted_iota(jnp.int32, (*x_H.shape[:-1], heads * channels), x_H.ndim - 1)
  repeated = x_H[..., heads - 1 :]
  for index in reversed(range(heads - 1)):
    repeated = jnp.where(head < (index + 1) * channels, x_H[..., index : index + 1], repeated)
  return jnp.broadcast_to(repeated, head.shape)


def _forward(x_H: Array, channels: int) -> tuple[Array, None]:
  return repeat_heads(x_H, channels), None


def _backward(channels: int, saved: None, gradient: Array) -> tuple[Array]:
  del saved
  width = gradient.shape[-1]
  sums = [
      jnp.sum(gradient[..., begin : begin + channels], axis=-1)
      for begin in range(0, width, channels)
  ]
  return (jnp.stack(sums, axis=-1),)


repeat_heads.defvjp(_forward, _backward)
