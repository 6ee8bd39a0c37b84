"""Short causal depthwise convolution and its silu; respects documents, carries its last inputs."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from dense_jax.batch import Segments
from dense_jax.ops import sequence_parallel
from dense_jax.ops.cpu import spread
from dense_jax.types import Array

Convolve = Callable[[Array, Array, Array, Array | None, Array | None], Array]
"""The function that `convolve` computes: (x, kernel, bias, document, tail) -> y."""


def short_conv(
    x_BTE: Array,
    kernel_WE: Array,
    bias_E: Array,
    segments: Segments,
    tail_BWE: Array | None,
    function: Convolve,
) -> tuple[Array, Array]:
  """Computes y_t = silu(bias + sum_j kernel[W - 1 - j] x_{t-j}), over tokens of t's own document.

  Args:
    x_BTE: inputs.
    kernel_WE: the taps; the last one multiplies the newest token.
    bias_E: added to every sum.
    segments: the documents.
    tail_BWE: the W - 1 inputs before the first token, zero where the document has none; None means
      zeros.
    function: `convolve` with delays, or an equivalent for the platform.

  Returns:
    y_BTE, and the tail after the last token that is not padding; both in x's dtype.
  """
  batch, time, width = x_BTE.shape
  taps = kernel_WE.shape[0]
  chex.assert_shape(kernel_WE, (taps, width))
  resets_BT, valid_BT = segments.resets_BT, segments.valid_BT
  before_BWE = tail_BWE
  if tail_BWE is None:
    tail_BWE = jnp.zeros((batch, taps - 1, width), x_BTE.dtype)
  chex.assert_shape(tail_BWE, (batch, taps - 1, width))
  if sequence_parallel.shards() > 1:
    before_BWE = tail_BWE = sequence_parallel.tail_before(x_BTE, resets_BT, tail_BWE)
  tail_BWE = tail_BWE.astype(x_BTE.dtype)
  document_BT = None
  if resets_BT is not None:
    # The tail belongs to document 0, the one that continues until the row's first reset.
    document_BT = jnp.cumsum(resets_BT, axis=1, dtype=jnp.int32)
    first_BW = jnp.zeros((batch, taps - 1), jnp.int32)
  y_BTE = function(
      x_BTE, kernel_WE, bias_E, document_BT, None if before_BWE is None else tail_BWE
  )

  if valid_BT is None or document_BT is None:
    last_BWE = x_BTE[:, max(0, time - taps + 1) :]
    return y_BTE, jnp.concatenate([tail_BWE[:, last_BWE.shape[1] :], last_BWE], axis=1)
  # The last inputs, counted from the tail's first; the row is not copied to be joined to its tail.
  lengths_B1 = jnp.sum(valid_BT, axis=1, keepdims=True, dtype=jnp.int32)
  index_BW = lengths_B1 + jnp.arange(taps - 1)[None]
  from_row_BW = index_BW - (taps - 1)
  document_BT = jnp.concatenate([first_BW, document_BT], axis=1)
  last_B1 = jnp.take_along_axis(document_BT, lengths_B1 + taps - 2, axis=1)
  same_BW = jnp.take_along_axis(document_BT, index_BW, axis=1) == last_B1
  row_BWE = jnp.take_along_axis(x_BTE, jnp.clip(from_row_BW, 0)[..., None], axis=1)
  old_BWE = jnp.take_along_axis(tail_BWE, jnp.clip(index_BW, 0, taps - 2)[..., None], axis=1)
  tail_BWE = jnp.where((from_row_BW < 0)[..., None], old_BWE, row_BWE)
  return y_BTE, jnp.where(same_BW[..., None], tail_BWE, 0)


def convolve(
    x_BTE: Array,
    kernel_WE: Array,
    bias_E: Array,
    document_BT: Array | None,
    tail_BWE: Array | None,
    *,
    delays: Callable[[Array, Array], list[Array]],
) -> Array:
  """Computes the y_BTE of `short_conv`.

  Args:
    x_BTE: inputs.
    kernel_WE: the taps.
    bias_E: added to every sum.
    document_BT: int32, the number of each token's document in its row; None means one document. The
      tail belongs to document 0.
    tail_BWE: the inputs before the first token, in x's dtype; None means zeros.
    delays: `delays_by_padding`, or an equivalent for the platform.
  """
  batch, time, width = x_BTE.shape
  taps = kernel_WE.shape[0]
  if tail_BWE is None:
    tail_BWE = jnp.zeros((batch, taps - 1, width), x_BTE.dtype)
  # In a loop over layers these are the same in each, unless they seem to depend on its parameters.
  # XLA would compute masks, padded tails and even zeros of the size of x before the loop, to be
  # read in each.
  kernel_WE, tail_BWE, document_BT, zero = jax.lax.optimization_barrier(
      (kernel_WE, tail_BWE, document_BT, jnp.zeros((), x_BTE.dtype))
  )
  y_BTE = spread(bias_E, x_BTE)
  for back, past_BTE in enumerate(delays(x_BTE, tail_BWE)):
    if document_BT is not None and back:
      first_BW = jnp.zeros((batch, back), jnp.int32)
      same_BT = jnp.concatenate([first_BW, document_BT], 1)[:, :time] == document_BT
      past_BTE = jnp.where(same_BT[..., None], past_BTE, zero)
    y_BTE = y_BTE + past_BTE * spread(kernel_WE[taps - 1 - back], x_BTE)
  return jax.nn.silu(y_BTE.astype(x_BTE.dtype))


def delays_by_padding(x_BTE: Array, tail_BWE: Array) -> list[Array]:
  """Returns the inputs of 0 to W - 1 tokens before, [B, T, E] each, without a copy of the row.

  The row and its tail are padded and added, which compilers fuse into what reads the result. They
  write out a concatenation.
  """
  time, taps = x_BTE.shape[1], tail_BWE.shape[1] + 1

  def shifted(x_BTE: Array, low: int) -> Array:
    padding = ((0, 0, 0), (low, time - low - x_BTE.shape[1], 0), (0, 0, 0))
    return jax.lax.pad(x_BTE, jnp.zeros((), x_BTE.dtype), padding)

  return [x_BTE] + [
      shifted(x_BTE[:, : max(0, time - back)], min(back, time))
      + shifted(tail_BWE[:, taps - 1 - back :][:, :time], 0)
      for back in range(1, taps)
  ]


def short_conv_step(
    x_BE: Array, kernel_WE: Array, bias_E: Array, tail_BWE: Array
) -> tuple[Array, Array]:
  """Computes one token of `short_conv`; returns y_BE and the next tail, in x's dtype."""
  window = jnp.concatenate([tail_BWE.astype(x_BE.dtype), x_BE[:, None]], axis=1)
  y_BE = spread(bias_E, x_BE)
  # Tap by tap, in the same order as `short_conv`; a sum over W is slow on a CPU.
  for tap in range(kernel_WE.shape[0]):
    y_BE = y_BE + window[:, tap] * spread(kernel_WE[tap], x_BE)
  return jax.nn.silu(y_BE.astype(x_BE.dtype)), window[:, 1:]
