"""Short causal depthwise convolution that respects documents and carries its last inputs."""

import chex
import jax.numpy as jnp

from dense_jax.batch import Segments
from dense_jax.ops import sequence_parallel
from dense_jax.ops.cpu import spread
from dense_jax.types import Array


def short_conv(
    x_BTE: Array,
    kernel_WE: Array,
    bias_E: Array,
    segments: Segments,
    tail_BWE: Array,
) -> tuple[Array, Array]:
  """Computes y_t = bias + sum_j kernel[W - 1 - j] x_{t-j}, over tokens of t's own document.

  Args:
    x_BTE: inputs.
    kernel_WE: the taps; the last one multiplies the newest token.
    bias_E: added to every output.
    segments: the documents.
    tail_BWE: the W - 1 inputs before the first token, zero where the document has none.

  Returns:
    y_BTE, and the tail after the last token that is not padding; both in x's dtype.
  """
  batch, time, width = x_BTE.shape
  taps = kernel_WE.shape[0]
  chex.assert_shape(kernel_WE, (taps, width))
  chex.assert_shape(tail_BWE, (batch, taps - 1, width))
  resets_BT, valid_BT = segments.resets_BT, segments.valid_BT
  if sequence_parallel.shards() > 1:
    tail_BWE = sequence_parallel.tail_before(x_BTE, resets_BT, tail_BWE)
  past = jnp.concatenate([tail_BWE.astype(x_BTE.dtype), x_BTE], axis=1)
  kernel_WE = kernel_WE.astype(x_BTE.dtype)
  y_BTE = spread(bias_E.astype(x_BTE.dtype), x_BTE)
  if resets_BT is None or valid_BT is None:
    for tap in range(taps):
      y_BTE = y_BTE + past[:, tap : tap + time] * spread(kernel_WE[tap], x_BTE)
    return y_BTE, past[:, time:]

  # The tail belongs to document 0, the one that continues until the row's first reset.
  document = jnp.cumsum(resets_BT, axis=1, dtype=jnp.int32)
  document = jnp.pad(document, ((0, 0), (taps - 1, 0)))
  for tap in range(taps):
    same = document[:, tap : tap + time] == document[:, taps - 1 :]
    shifted = jnp.where(same[..., None], past[:, tap : tap + time], 0)
    y_BTE = y_BTE + shifted * spread(kernel_WE[tap], x_BTE)
  lengths_B1 = jnp.sum(valid_BT, axis=1, keepdims=True, dtype=jnp.int32)
  index = lengths_B1 + jnp.arange(taps - 1)[None]
  tail_BWE = jnp.take_along_axis(past, index[..., None], axis=1)
  last = jnp.take_along_axis(document, lengths_B1 + taps - 2, axis=1)
  same = jnp.take_along_axis(document, index, axis=1) == last
  return y_BTE, jnp.where(same[..., None], tail_BWE, 0)


def short_conv_step(
    x_BE: Array, kernel_WE: Array, bias_E: Array, tail_BWE: Array
) -> tuple[Array, Array]:
  """Computes one token of `short_conv`; returns y_BE and the next tail, in x's dtype."""
  window = jnp.concatenate([tail_BWE.astype(x_BE.dtype), x_BE[:, None]], axis=1)
  kernel_WE = kernel_WE.astype(x_BE.dtype)
  y_BE = spread(bias_E.astype(x_BE.dtype), x_BE)
  # Tap by tap, in the same order as `short_conv`; a sum over W is slow on a CPU.
  for tap in range(kernel_WE.shape[0]):
    y_BE = y_BE + window[:, tap] * spread(kernel_WE[tap], x_BE)
  return y_BE, window[:, 1:]
