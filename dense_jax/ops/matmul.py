"""x W with gradients written as the contractions that compilers have fast paths for."""

import jax
import jax.numpy as jnp

from dense_jax.types import Array


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
  """[..., in] times [in, out], in x's dtype.

  JAX's own transpose rule leaves the kernel's gradient as a contraction that XLA's CPU
  backend computes 7 times as slowly as the one below (2048 x 512 x 2048, two cores).
  """
  return jnp.dot(x, kernel.astype(x.dtype))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return matmul(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  x, kernel = saved
  leading = tuple(range(x.ndim - 1))
  kernel_gradient = jax.lax.dot_general(
      x, gradient, ((leading, leading), ((), ())), preferred_element_type=kernel.dtype
  )
  return jnp.einsum("...o,io->...i", gradient, kernel.astype(x.dtype)), kernel_gradient


matmul.defvjp(_forward, _backward)


def spread(weight: Array, x: Array) -> Array:
  """A weight of the last axis or axes of x, [E], as large as x, [..., E].

  Broadcast through axes of 1, its gradient would be a sum over the second axis of [B, T, E]
  first: XLA's CPU backend does that 10 times as slowly where B is 1 (a short convolution's
  taps, 16384 tokens, E 256: 298 ms against 22, two cores).
  """
  return jnp.broadcast_to(weight, x.shape)


def materialize(x: Array) -> Array:
  """x, as the result of a contraction with the identity: exact, and computed only once.

  XLA's CPU backend fuses the making of a key into its outer product with the values, and
  so makes it again for every channel; decoding is up to twice as fast where it cannot. (An
  `optimization_barrier` does not stop it.)
  """
  return jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST)
