"""Matrix states on XLA's CPU backend: a workaround for decoding."""

import jax
import jax.numpy as jnp

from dense_jax.ops.matrix.reference import matrix_step
from dense_jax.types import Array


def cpu_matrix_step(h_BHPN: Array, log_decay_BH: Array, k_BJN: Array, v_BHP: Array) -> Array:
  """`matrix_step`, with the making of keys and short values kept out of their outer product.

  XLA's CPU backend fuses the making of a key into its outer product with the values, and so
  makes it again for every channel; decoding is up to twice as fast where it cannot. Values
  longer than keys would cost more than they save.
  """
  short = v_BHP.shape[-1] <= k_BJN.shape[-1]
  return matrix_step(
      h_BHPN, log_decay_BH, _computed_once(k_BJN), _computed_once(v_BHP) if short else v_BHP
  )


def _computed_once(x: Array) -> Array:
  """x, exactly, as the result of a contraction with the identity, which is not fused.

  An `optimization_barrier` does not stop the backend.
  """
  return jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST)
