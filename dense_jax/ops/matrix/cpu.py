"""Matrix states on XLA's CPU backend: a workaround for decoding."""

import jax
import jax.numpy as jnp

from dense_jax.ops.matrix.reference import matrix_step
from dense_jax.types import Array


def cpu_matrix_step(h_BHPN: Array, log_decay_BH: Array, k_BJN: Array, v_BHP: Array) -> Array:
  """Computes `matrix_step`, with keys and short values computed before their outer product.

  XLA's CPU backend fuses the computation of a key into its outer product with the values, and
  so repeats it for every channel. Decoding is up to twice as fast without that fusion. Values
  longer than keys are left alone: for them it would cost more than it saves.
  """
  short = v_BHP.shape[-1] <= k_BJN.shape[-1]
  return matrix_step(
      h_BHPN, log_decay_BH, _computed_once(k_BJN), _computed_once(v_BHP) if short else v_BHP
  )


def _computed_once(x: Array) -> Array:
  """Returns x, exactly, as the result of a product with the identity, which XLA does not fuse.

  An `optimization_barrier` does not prevent the fusion.
  """
  return jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST)
