"""Workarounds for XLA's CPU backend that all forms of state share.

Those of one form are in `diagonal/cpu.py` and `matrix/cpu.py`. Only the resolver puts them in
the place of what other platforms run, but for `spread`, which costs nothing elsewhere.
"""

import jax.numpy as jnp

from dense_jax.ops.matmul import matmul_by_contractions
from dense_jax.types import Array


def cpu_matmul(x: Array, kernel: Array) -> Array:
  """`matmul`, with a gradient that the backend has a fast path for.

  JAX's own transpose rule leaves the kernel's gradient as a contraction that XLA's CPU backend
  computes up to 7 times as slowly (2048 x 512 x 2048, two cores).
  """
  return matmul_by_contractions(x, kernel)


def spread(weight: Array, x: Array) -> Array:
  """Broadcasts a weight of the last axis or axes of x, [E], to the size of x, [..., E].

  Broadcast through axes of 1, its gradient would be a sum over the second axis of [B, T, E]
  first: XLA's CPU backend does that 10 times as slowly where B is 1 (a short convolution's
  taps, 16384 tokens, E 256: 298 ms against 22, two cores).
  """
  return jnp.broadcast_to(weight, x.shape)
