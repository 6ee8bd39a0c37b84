"""The matrix product x W of linear layers, with gradients in the dtype of each factor."""

import jax
import jax.numpy as jnp

from dense_jax.types import Array


def matmul(x: Array, kernel: Array) -> Array:
  """Multiplies x [..., in] by kernel [in, out], in x's dtype.

  Each factor's gradient has that factor's dtype. If the two dtypes differ (bfloat16 activations,
  float32 parameters), JAX's own rule would round the kernel's gradient to x's dtype; a custom
  rule replaces it, and such products have reverse-mode derivatives only.
  """
  if x.dtype == kernel.dtype:
    return jnp.dot(x, kernel)
  return matmul_by_contractions(x, kernel)


@jax.custom_vjp
def matmul_by_contractions(x: Array, kernel: Array) -> Array:
  """Computes `matmul`, with gradients written as contractions; no forward-mode derivatives."""
  return jnp.dot(x, kernel.astype(x.dtype))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  # Not a call of the function itself, inside which a policy of `jax.checkpoint` sees no product.
  return jnp.dot(x, kernel.astype(x.dtype)), (x, kernel)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  x, kernel = saved
  leading = tuple(range(x.ndim - 1))
  kernel_gradient = jax.lax.dot_general(
      x, gradient, ((leading, leading), ((), ())), preferred_element_type=kernel.dtype
  )
  return jnp.einsum("...o,io->...i", gradient, kernel.astype(x.dtype)), kernel_gradient


matmul_by_contractions.defvjp(_forward, _backward)


def kernel_dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
  """Contracts an axis of each of two blocks inside a kernel: factors of one dtype, float32 sums."""
  exact = left.dtype == jnp.float32
  return jax.lax.dot_general(
      left, right, (((axes[0],), (axes[1],)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
      preferred_element_type=jnp.float32,
  )


# Rows of the smallest product that XLA's GPU backend multiplies as one.
_GPU_ROWS = 8


def gpu_matmul(x: Array, kernel: Array) -> Array:
  """Computes `matmul`, one row [1, in] of low precision together with rows of zeros.

  XLA's GPU backend writes the product of one row as all its terms and their sum, which moves up to
  five times the bytes of the kernel (mamba2, decoding one text in bfloat16).
  """
  if x.ndim != 2 or x.shape[0] != 1 or x.dtype == jnp.float32:
    return matmul(x, kernel)
  rows = jnp.pad(x, ((0, _GPU_ROWS - 1), (0, 0)))
  y = jnp.dot(rows, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
  return y[:1].astype(x.dtype)
