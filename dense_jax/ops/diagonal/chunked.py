"""The selective diagonal recurrence (Mamba), in rematerialised chunks.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t h_t

The sequence is scanned chunk by chunk. The backward pass keeps the states between chunks and
recomputes those inside a chunk, so [B, T, N, E] never exists. Inside a chunk the states come
from `jax.lax.associative_scan`, or from a `jax.lax.scan` over tokens, which does less arithmetic
and needs less memory.
"""

import functools
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops import affine
from dense_jax.ops.chunks import chunk_length
from dense_jax.ops.diagonal.reference import diagonal_read, diagonal_step
from dense_jax.ops.token_scan import join_chunks, split_chunks, token_scan
from dense_jax.types import Array

# Tokens per chunk. By the TPU v5e compiler, one layer, forward and backward (4 x 2048 tokens,
# E 2048, N 16), token by token, moves 0.92 GB of memory at 8 tokens per chunk, 0.71 at 16,
# 0.96 at 32 and 3.10 at 64.
DEFAULT_CHUNK = 16


# An array of queries, or None, for which there is no read.
QueryT = TypeVar("QueryT", Array, None)


def _associative_chunk(
    a_NE: Array, h_BNE: Array, chunk: tuple[Array, Array, Array, Array | None, Array | None]
) -> tuple[Array, Array | None]:
  dt_CBE, x_CBE, b_CBN, c_CBN, resets_CB = chunk
  dt_CBE = dt_CBE.astype(jnp.float32)
  decay = jnp.exp(dt_CBE[:, :, None, :] * a_NE[None, None])
  if resets_CB is not None:
    decay = jnp.where(resets_CB[:, :, None, None], 0.0, decay)
  u_CBE = dt_CBE * x_CBE.astype(jnp.float32)
  u = u_CBE[:, :, None, :] * b_CBN.astype(jnp.float32)[..., None]
  decay, u = jax.lax.associative_scan(affine.compose, (decay, u))
  h = decay * h_BNE[None] + u
  if c_CBN is None:
    return h[-1], None
  return h[-1], jnp.sum(h * c_CBN.astype(jnp.float32)[..., None], axis=2)


def token_by_token(
    dt_BTE: Array,
    a_BNE: Array,
    x_BTE: Array,
    b_BTN: Array,
    c_BTN: QueryT,
    resets_BT: Array | None,
    initial_BNE: Array,
    *,
    chunk: int = 0,
) -> tuple[QueryT, Array]:
  """Computes the read of one query by a `jax.lax.scan` over tokens.

  Arguments and results are those of `associative_scan`, except that the decay rates `a_BNE` have
  a batch axis, of size B or 1.
  """
  _check(dt_BTE, a_BNE[0], x_BTE, b_BTN, c_BTN, initial_BNE)

  def read(h_BNE: Array, c_BN: Array | None) -> Array | None:
    return None if c_BN is None else diagonal_read(h_BNE, c_BN)

  return token_scan(
      functools.partial(diagonal_step, a_BNE), read, initial_BNE, (dt_BTE, x_BTE, b_BTN), c_BTN,
      resets_BT, chunk=chunk, unroll=DEFAULT_CHUNK,
  )


def associative_scan(
    dt_BTE: Array,
    a_NE: Array,
    x_BTE: Array,
    b_BTN: Array,
    c_BTN: QueryT,
    resets_BT: Array | None,
    initial_BNE: Array,
    *,
    chunk: int = 0,
) -> tuple[QueryT, Array]:
  """Computes the read of one query by `jax.lax.associative_scan` (arXiv 2312.00752, algorithm 2).

  Args:
    dt_BTE: step sizes >= 0; zero leaves the state unchanged.
    a_NE: float32 decay rates <= 0.
    x_BTE: inputs.
    b_BTN: input maps.
    c_BTN: queries; None means no read.
    resets_BT: bool, true where the state is cleared before the token; None means never.
    initial_BNE: float32 state before the first token.
    chunk: tokens per chunk; 0 means DEFAULT_CHUNK.

  Returns:
    y_BTE (None without queries) and final_BNE, the state after the last token; both float32.
  """
  _check(dt_BTE, a_NE, x_BTE, b_BTN, c_BTN, initial_BNE)
  time = x_BTE.shape[1]
  chunk = chunk_length(chunk, DEFAULT_CHUNK, time)
  # dt = 0 in the padding, which leaves the state unchanged.
  inputs = split_chunks((dt_BTE, x_BTE, b_BTN, c_BTN, resets_BT), chunk)
  body = jax.checkpoint(functools.partial(_associative_chunk, a_NE), prevent_cse=False)
  final_BNE, y = jax.lax.scan(body, initial_BNE, inputs)
  return join_chunks(y, time), final_BNE


def _check(
    dt_BTE: Array, a_NE: Array, x_BTE: Array, b_BTN: Array, c_BTN: Array | None,
    initial_BNE: Array,
) -> None:
  batch, time, width = x_BTE.shape
  state_size = a_NE.shape[0]
  chex.assert_shape(dt_BTE, (batch, time, width))
  chex.assert_shape([b_BTN] if c_BTN is None else [b_BTN, c_BTN], (batch, time, state_size))
  chex.assert_shape(initial_BNE, (batch, state_size, width))
  chex.assert_type([a_NE, initial_BNE], jnp.float32)
