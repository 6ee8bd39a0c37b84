"""Attention on NVIDIA GPUs by cuDNN's flash attention, where it covers what is asked.

It has kernels for bfloat16 and float16 and heads of up to 128 channels, with a causal mask, a
window to the left, or a mask that is an array. It has no numbers of documents. So

    rows of one document each       a causal mask and a window, nothing else in memory
    documents, or a cache before    an array of one mask for all heads, in rows of up to 4096
                                    positions: at most 8 KB a token
    the same in longer rows         the blockwise form

Only the data tell whether rows hold one document, so that the first two are two branches.
"""

import jax
import jax.numpy as jnp

from dense_jax.ops.attention.blockwise import blockwise_attention
from dense_jax.ops.attention.reference import Documents, check_shapes, window_mask
from dense_jax.types import Array

# Hopper's kernels take heads of up to 256 channels, those of older GPUs this many.
MAX_HEAD_DIM = 128
DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
# The longest rows for which a mask is made.
_MASKED_POSITIONS = 4096


def covers(dtype: jnp.dtype, head_dim: int) -> bool:
  """Returns whether cuDNN has kernels for this dtype and this many channels of a head."""
  return jnp.dtype(dtype) in DTYPES and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def cudnn_attention(
    q_BTHN: Array, k_BSJN: Array, v_BSJN: Array, documents: Documents | None, window: int
) -> Array:
  """Computes attention by cuDNN, or block by block; see `Attend`."""
  check_shapes(q_BTHN, k_BSJN, v_BSJN)
  time, positions = q_BTHN.shape[1], k_BSJN.shape[1]

  def whole_rows(q_BTHN: Array, k_BTJN: Array, v_BTJN: Array) -> Array:
    return jax.nn.dot_product_attention(
        q_BTHN, k_BTJN, v_BTJN, is_causal=True, implementation="cudnn",
        local_window_size=(window - 1, 0) if window < time else None,
    )

  def packed_rows(q_BTHN: Array, k_BSJN: Array, v_BSJN: Array) -> Array:
    # With a mask, gradients need even lengths.
    if positions > _MASKED_POSITIONS or time % 2 or positions % 2:
      return blockwise_attention(q_BTHN, k_BSJN, v_BSJN, documents, window)
    return jax.nn.dot_product_attention(
        q_BTHN, k_BSJN, v_BSJN, mask=window_mask(time, positions, documents, window)[:, None],
        is_causal=positions == time, implementation="cudnn",
    )

  if positions != time:
    return packed_rows(q_BTHN, k_BSJN, v_BSJN)
  if documents is None:
    return whole_rows(q_BTHN, k_BSJN, v_BSJN)
  number_BT = documents.queries_BT
  one_each = jnp.all(number_BT == number_BT[:, :1])
  return jax.lax.cond(one_each, whole_rows, packed_rows, q_BTHN, k_BSJN, v_BSJN)
