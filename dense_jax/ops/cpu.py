"""Workarounds for XLA's CPU backend that all forms of state share.

Workarounds for one form are in `diagonal/cpu.py` and `matrix/cpu.py`. The resolver selects them
on a CPU. The exception is `spread`, which costs nothing elsewhere and runs on every platform.
"""

import jax.numpy as jnp

from dense_jax.ops.matmul import matmul_by_contractions
from dense_jax.types import Array


def cpu_matmul(x: Array, kernel: Array) -> Array:
  """Computes `matmul`, with a gradient that takes the CPU backend's fast path.

  JAX's own transpose rule writes the kernel's gradient as a contraction that XLA's CPU backend
  computes up to 7 times as slowly (2048 x 512 x 2048, two cores). Like `matmul_by_contractions`,
  it has no forward-mode derivatives.
  """
  return matmul_by_contractions(x, kernel)


def cpu_delays(x_BTE: Array, tail_BWE: Array) -> list[Array]:
  """Computes `delays_by_padding` as slices of one array, which the CPU backend reads faster.

  Padded arrays cost a comparison an element, and make a convolution's gradient 1.2 to 1.3 times as
  slow (two cores).
  """
  time, taps = x_BTE.shape[1], tail_BWE.shape[1] + 1
  past = jnp.concatenate([tail_BWE, x_BTE], axis=1)
  return [past[:, taps - 1 - back :][:, :time] for back in range(taps)]


def spread(weight: Array, x: Array) -> Array:
  """Broadcasts a weight of the last axis or axes of x, [E], to the shape of x, [..., E].

  With implicit broadcasting, the weight's gradient would sum over the second axis of [B, T, E]
  first, which XLA's CPU backend does 10 times as slowly if B is 1 (a short convolution's taps,
  16384 tokens, E 256: 298 ms against 22, two cores).
  """
  return jnp.broadcast_to(weight, x.shape)


def split_groups(x: Array, groups: int) -> Array:
  """Splits the last axis of x, [..., E], into equal groups, [..., J, E / J]."""
  return x.reshape(*x.shape[:-1], groups, -1)


def cpu_split_groups(x: Array, groups: int) -> Array:
  """Splits like `split_groups`, but leaves one axis before the groups' channels.

  XLA's CPU backend sums over the last axis of a matrix up to 5 times as fast as over that of
  [B, T, J, E / J] (a norm of 2048 x 1024, forward and backward: 2.5 ms against 10.2, one core).
  """
  return x.reshape(-1, x.shape[-1] // groups)
