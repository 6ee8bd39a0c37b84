"""The forward kernel of matrix states: all sources' reads of a chunk and what follows them."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dense_jax.ops.matrix.tpu_chunk import (
    Blocks,
    Finish,
    LowRank,
    Place,
    Stream,
    Tokens,
    dot,
    joined,
    sigmoid_and_silu,
    write_rows,
)
from dense_jax.types import Array, PyTree


def _read(
    blocks: Blocks, place: Place, source: Stream, tokens: Tokens, before_XN: PyTree, h: PyTree
) -> Array:
  """Computes a source's read of a chunk, [C, X], and advances its state over the chunk."""

  @pl.when(place.is_first_chunk)
  def _begin() -> None:
    if source.initial_BEN is None:
      h[place.set_rows] = jnp.zeros((blocks.rows, h.shape[1]), jnp.float32)
    else:
      pltpu.sync_copy(source.initial_BEN.at[place.row, place.all_rows], h.at[place.set_rows])

  h_XN = h[place.set_rows]
  if before_XN is not None:
    before_XN[...] = h_XN.astype(before_XN.dtype)
  carried_CX = dot(tokens.q_CN, h_XN, (1, 1), tokens.dtype)
  read_CX, added_XN = _of_chunk(blocks, tokens, carried_CX)
  h[place.set_rows] = tokens.decayed(h_XN) + added_XN
  return read_CX


def _of_chunk(
    blocks: Blocks, tokens: Tokens, carried_CX: Array | None = None
) -> tuple[Array, Array]:
  """Reads a chunk's own tokens.

  Args:
    blocks: the division of states into blocks.
    tokens: the chunk.
    carried_CX: the product of queries and the state before the chunk, which is read too; None means
      that another source reads it.

  Returns:
    The read, [C, X], and what the tokens add to the state after the chunk.
  """
  reads, kept = [], []
  for head in range(blocks.heads):
    v_CP = tokens.value_CP(head)
    read_CP = dot(tokens.scores_CC * tokens.within_CC(head), v_CP, (1, 0), tokens.dtype)
    if carried_CX is not None:
      read_CP += tokens.from_start_C1[head] * blocks.of(carried_CX, head)
    reads.append(read_CP)
    kept.append(tokens.to_end_C1[head] * v_CP.astype(jnp.float32))
  return joined(reads), dot(joined(kept), tokens.k_CN, (0, 0), tokens.dtype)


def _gated(place: Place, source: Stream, y_CX: Array, dtype: jnp.dtype) -> Array:
  """Multiplies a read by its gate."""
  if isinstance(source.gate, LowRank):
    return y_CX * sigmoid_and_silu(source.gate.before(place, dtype))[1]
  return y_CX if source.gate is None else y_CX * source.gate[...].astype(jnp.float32)


def forward_kernel(
    blocks: Blocks,
    streams: tuple[Stream, ...],
    finish: Finish,
    count_1C: PyTree,
    y_CX: PyTree,
    moments_U2C: PyTree,
    final_BEN: PyTree,
    before: PyTree,
    states: PyTree,
    scores: PyTree,
) -> None:
  """Computes the epilogue of the sum of all sources' reads of a chunk, and advances their states.

  Args:
    blocks: the division of states into blocks.
    streams: the sources.
    finish: the epilogue's arrays.
    count_1C: resets up to each token of the chunk, inclusive; None means none.
    y_CX: the result, an output.
    moments_U2C: the result's sum and sum of squares over each head, outputs; None means not wanted.
    final_BEN: the first source's last state, an output.
    before: each source's state before the chunk, before_XN, outputs; None means not saved.
    states: each source's states of a set of blocks, carried from chunk to chunk; None for sources
      that join.
    scores: each source's scores_CC of the chunk, which the blocks of a set share.
  """
  place = Place.here(blocks)
  chunks = [
      Tokens(blocks, place, source, count_1C, scores_CC)
      for source, scores_CC in zip(streams, scores, strict=True)
  ]
  reads: list[tuple[Stream, Array]] = []
  for source, tokens, before_XN, h in zip(streams, chunks, before, states, strict=True):
    if not source.joins:
      leaders_h = h
      reads.append((source, _read(blocks, place, source, tokens, before_XN, h)))
      continue
    leader, read_CX = reads.pop()
    joined_CX, added_XN = _of_chunk(blocks, tokens)
    leaders_h[place.set_rows] += added_XN
    reads.append((leader, read_CX + joined_CX))
  own_CX, *others = [_gated(place, source, x_CX, chunks[0].dtype) for source, x_CX in reads]
  out_CX = sum(others, start=own_CX)
  if finish.skip_1E is not None:
    x_CX = chunks[0].raw_CX if finish.x_BTE is None else finish.x_BTE[...]
    out_CX += finish.skip_1E[...] * x_CX.astype(jnp.float32)
  if finish.z_BTE is not None:
    out_CX *= sigmoid_and_silu(finish.z_BTE[...])[1]
  y_CX[...] = out_CX.astype(y_CX.dtype)
  if moments_U2C is not None:
    heads = [blocks.of(out_CX, head) for head in range(blocks.heads)]
    sums = [[jnp.sum(x, axis=1, keepdims=True) for x in (y, y * y)] for y in heads]
    write_rows(sums, moments_U2C, place)

  @pl.when(place.is_last_chunk)
  def _end() -> None:
    pltpu.sync_copy(states[0].at[place.set_rows], final_BEN.at[place.row, place.all_rows])
