"""Attention on TPUs by JAX's own Pallas kernels (splash attention).

The kernels visit only the blocks that a window reaches, and take numbers of documents. Rows are
padded to whole blocks. The kernels are an experimental part of JAX, and imported where they run.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dense_jax.ops import partition
from dense_jax.ops.attention.blockwise import blockwise_attention
from dense_jax.ops.attention.reference import Documents, check_shapes
from dense_jax.types import WIDTH_AXIS, Array

_LANES = 128
# Block lengths, the best first.
_BLOCKS = (512, 256, _LANES)


def splash_attention(
    q_BTHN: Array, k_BSJN: Array, v_BSJN: Array, documents: Documents | None, window: int,
    *, interpret: bool = False,
) -> Array:
  """Computes attention by a kernel on each device of the current mesh; see `Attend`.

  If the mesh would split heads that share keys, it is computed block by block instead.
  """
  check_shapes(q_BTHN, k_BSJN, v_BSJN)
  kernel = functools.partial(_on_device, window=window, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(q_BTHN, k_BSJN, v_BSJN, documents)
  if k_BSJN.shape[2] % mesh.shape[WIDTH_AXIS]:
    return blockwise_attention(q_BTHN, k_BSJN, v_BSJN, documents, window)
  by_head = partition.by_row(None, WIDTH_AXIS)
  if documents is not None:
    batch = q_BTHN.shape[0]
    documents = Documents(*(jnp.broadcast_to(x, (batch, x.shape[1])) for x in documents))
  return partition.over_mesh(
      kernel, lambda _: (by_head, by_head, by_head, partition.by_row()), by_head,
      q_BTHN, k_BSJN, v_BSJN, documents,
  )


def _on_device(
    q_BTHN: Array, k_BSJN: Array, v_BSJN: Array, documents: Documents | None, *, window: int,
    interpret: bool,
) -> Array:
  """Runs the kernel on arrays of one device."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
      splash_attention_kernel,
      splash_attention_mask,
  )

  batch, time, _, size = q_BTHN.shape
  before = k_BSJN.shape[1] - time
  # Whole blocks before the first query, and from there on: a query keeps its own key.
  front, back = -before % _LANES, -time % _LANES
  if front and documents is None:
    documents = Documents(*(jnp.zeros((1, x.shape[1]), jnp.int32) for x in (q_BTHN, k_BSJN)))
  segments = None
  if documents is not None:
    queries_BT = jnp.pad(documents.queries_BT, ((0, 0), (0, back)))
    keys_BS = jnp.pad(documents.keys_BS, ((0, 0), (0, back)))
    keys_BS = jnp.pad(keys_BS, ((0, 0), (front, 0)), constant_values=-1)
    segments = splash_attention_kernel.SegmentIds(
        *(jnp.broadcast_to(x, (batch, x.shape[1])) for x in (queries_BT, keys_BS))
    )

  def by_head(x: Array, widths: tuple[int, int]) -> Array:
    return jnp.swapaxes(jnp.pad(x, ((0, 0), widths, (0, 0), (0, 0))), 1, 2)

  q_BHTN = by_head((q_BTHN / math.sqrt(size)).astype(q_BTHN.dtype), (0, back))
  k_BJSN, v_BJSN = by_head(k_BSJN, (front, back)), by_head(v_BSJN, (front, back))
  shape = q_BHTN.shape[2], k_BJSN.shape[2]
  # One mask for all heads.
  mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), before + front)
  kernel = splash_attention_kernel.make_splash_mha_single_device(
      splash_attention_mask.MultiHeadMask([mask]), block_sizes=_block_sizes(*shape),
      interpret=interpret,
  )
  y_BHTN = jax.vmap(kernel)(q_BHTN, k_BJSN, v_BJSN, segments)
  return jnp.swapaxes(y_BHTN, 1, 2)[:, :time]


def _block_sizes(time: int, positions: int) -> Any:
  """Returns the kernels' block lengths: the longest that divide both lengths."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

  query, key = (
      next(block for block in _BLOCKS if length % block == 0) for length in (time, positions)
  )
  return splash_attention_kernel.BlockSizes(
      block_q=query, block_kv=key, block_kv_compute=key,
      block_q_dkv=query, block_kv_dkv=key, block_kv_dkv_compute=key,
      block_q_dq=query, block_kv_dq=key,
  )
