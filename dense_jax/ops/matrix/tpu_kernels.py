"""Kernels that one program of `dense_jax.ops.matrix.tpu` runs on a chunk.

Arguments of type PyTree or Stream are references to the program's own blocks of the arrays.
References named _BEN or _BGEN are to states of the whole batch: those stay in HBM and are copied
when needed, as buffers for them would fill most of VMEM.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dense_jax.ops.matrix.log_decay import LogDecay
from dense_jax.types import Array, PyTree

SUBLANES = 8  # Rows of a float32 tile.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
  """A source as the kernels take it, or references, block specs or gradients of its arrays.

  K is J * N here. `sum_BHG2C` is the log decay, summed within each chunk: the rows `high` and
  `low` of a `LogDecay`. Its gradient has the row `low` alone.
  """

  q_BTK: PyTree
  k_BTK: PyTree
  v_BTE: PyTree
  sum_BHG2C: PyTree
  gate_BTE: PyTree
  initial_BEN: PyTree


@dataclasses.dataclass(frozen=True)
class Blocks:
  """A division of the E = H * P rows of a state into blocks.

  Attributes:
    heads: U, the heads in a block.
    width: rows of each of these heads.
    parts: blocks that one head is cut into; 1 if a block holds whole heads.
    per_group: blocks of a group of heads that share keys.
    count: the number of all blocks.
  """

  heads: int
  width: int
  parts: int
  per_group: int
  count: int

  @property
  def rows(self) -> int:
    """X, the rows of a block."""
    return self.heads * self.width

  def of(self, x_CX: Array, head: int) -> Array:
    """Returns the lanes of one of the block's heads."""
    return x_CX[:, head * self.width : (head + 1) * self.width]

  def states(self, states: PyTree) -> PyTree:
    """Returns the program's own part [X, N] of a reference [B, E, N] or [B, G, E, N].

    Must not be called inside a branch.
    """
    own = pl.ds(pl.multiple_of(pl.program_id(1) * self.rows, SUBLANES), self.rows)
    row = pl.program_id(0)
    return states.at[row, own] if states.ndim == 3 else states.at[row, pl.program_id(2), own]


def _dot(left: Array, right: Array, axes: tuple[int, int], dtype: jnp.dtype) -> Array:
  """Contracts an axis of each array, with factors in `dtype` and float32 sums."""
  exact = dtype == jnp.float32
  return jax.lax.dot_general(
      left.astype(dtype), right.astype(dtype), (((axes[0],), (axes[1],)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
      preferred_element_type=jnp.float32,
  )


def _transposed(rows: Sequence[Array]) -> list[Array]:
  """Turns rows [1, C] into columns [C, 1] by one transposition of whole tiles."""
  empty = -len(rows) % SUBLANES
  padding = [jnp.zeros((empty, rows[0].shape[1]), jnp.float32)] if empty else []
  columns = jnp.concatenate([*rows, *padding], axis=0).T
  return [columns[:, i : i + 1] for i in range(len(rows))]


class _Decays:
  """A chunk's decays for each head of a block; exponents are <= 0, and masked before exp.

  Attributes:
    from_start_C1: for each head, the decay of the carried state up to each token.
    to_end_C1: for each head, the decay from each token to the end of the chunk.
    whole_11: for each head, the decay of the carried state over the whole chunk.
  """

  def __init__(self, sum_U2C: PyTree, count_1C: Array | None):
    heads, _, chunk = sum_U2C.shape
    self._rows = [LogDecay(sum_U2C[head, 0:1], sum_U2C[head, 1:2]) for head in range(heads)]
    carried = None if count_1C is None else count_1C == 0
    kept = None if count_1C is None else count_1C == count_1C[:, chunk - 1 :]
    from_start = [_weight(carried, rows.total()) for rows in self._rows]
    to_end = [_weight(kept, rows[:, chunk - 1 :].since(rows)) for rows in self._rows]
    self.whole_11 = [weight_1C[:, chunk - 1 :] for weight_1C in from_start]

    counts = [] if count_1C is None else [count_1C]
    high_and_low = [row_1C for rows in self._rows for row_1C in (rows.high, rows.low)]
    columns = _transposed([*high_and_low, *from_start, *to_end, *counts])
    self._columns = [LogDecay(*columns[i : i + 2]) for i in range(0, 2 * heads, 2)]
    self.from_start_C1 = columns[2 * heads : 3 * heads]
    self.to_end_C1 = columns[3 * heads : 4 * heads]
    self._query = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    self._key = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    self._sees = self._query >= self._key
    if count_1C is not None:
      self._sees &= columns[-1] == count_1C

  def within_CC(self, head: int) -> Array:
    """Returns the decay from the key's token (second axis) to the query's (first axis)."""
    return _weight(self._sees, self._columns[head].since(self._rows[head]))

  def itself_CC(self) -> Array:
    """Returns a bool mask, true where the query's token is the key's."""
    return self._query == self._key


def _weight(mask: Array | None, log_weight: Array) -> Array:
  """exp(log_weight) where `mask` is true, else 0."""
  return jnp.exp(log_weight if mask is None else jnp.where(mask, log_weight, -jnp.inf))


def _absorb(blocks: Blocks, h_XN: PyTree, decays: _Decays, added_XN: Array) -> None:
  """Updates h = decay over the chunk * h + added, in place."""
  for head, whole_11 in enumerate(decays.whole_11):
    rows = pl.ds(head * blocks.width, blocks.width)
    h_XN[rows] = whole_11 * h_XN[rows] + added_XN[head * blocks.width :][: blocks.width]


def _forward_source(
    blocks: Blocks,
    source: Stream,
    count_1C: Array | None,
    before_BGEN: PyTree,
    h_XN: PyTree,
    semaphore: PyTree,
) -> Array:
  """Computes a source's gated read of a chunk, [C, X], and advances its state over the chunk."""
  initial_XN = blocks.states(source.initial_BEN)

  @pl.when(pl.program_id(2) == 0)
  def _begin() -> None:
    pltpu.sync_copy(initial_XN, h_XN)

  saving = None
  if before_BGEN is not None:
    saving = pltpu.make_async_copy(h_XN, blocks.states(before_BGEN), semaphore)
    saving.start()
  q_CN, k_CN, v_CX = source.q_BTK[...], source.k_BTK[...], source.v_BTE[...]
  dtype = jnp.result_type(q_CN, k_CN, v_CX)
  decays = _Decays(source.sum_BHG2C, count_1C)
  scores_CC = _dot(q_CN, k_CN, (1, 1), dtype)
  carried_CX = _dot(q_CN, h_XN[...], (1, 1), dtype)
  reads, kept = [], []
  for head in range(blocks.heads):
    v_CP = blocks.of(v_CX, head)
    read_CP = _dot(scores_CC * decays.within_CC(head), v_CP, (1, 0), dtype)
    reads.append(read_CP + decays.from_start_C1[head] * blocks.of(carried_CX, head))
    kept.append(decays.to_end_C1[head] * v_CP.astype(jnp.float32))
  added_XN = _dot(_joined(kept), k_CN, (0, 0), dtype)
  if saving is not None:
    saving.wait()
  _absorb(blocks, h_XN, decays, added_XN)
  y_CX = _joined(reads)
  gate_CX = source.gate_BTE
  return y_CX if gate_CX is None else y_CX * gate_CX[...].astype(jnp.float32)


def _joined(heads: list[Array]) -> Array:
  return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=1)


def forward_kernel(
    blocks: Blocks,
    streams: tuple[Stream, ...],
    count_1C: PyTree,
    y_CX: PyTree,
    final_BEN: PyTree,
    before: PyTree,
    states: PyTree,
    semaphore: PyTree,
) -> None:
  """Computes the sum of all sources' gated reads of a chunk, and advances their states over it.

  Args:
    blocks: the division of states into blocks.
    streams: the sources.
    count_1C: resets up to each token of the chunk, inclusive; None means none.
    y_CX: the sum, an output.
    final_BEN: the first source's last state, an output.
    before: each source's states between chunks, before_BGEN, outputs; None means not saved.
    states: each source's state h_XN, carried from chunk to chunk.
    semaphore: for asynchronous copies.
  """
  final_XN = blocks.states(final_BEN)
  count = None if count_1C is None else count_1C[...]
  y_CX[...] = sum(
      _forward_source(blocks, source, count, before_BGEN, h_XN, semaphore)
      for source, before_BGEN, h_XN in zip(streams, before, states, strict=True)
  )

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _end() -> None:
    pltpu.sync_copy(states[0], final_XN)


def backward_kernel(
    blocks: Blocks,
    source: Stream,
    count_1C: PyTree,
    dy_CX: PyTree,
    d_final_BEN: PyTree,
    before_XN: PyTree,
    gradient: Stream,
    states: PyTree,
    semaphore: PyTree,
) -> None:
  """Computes one source's gradients in a chunk; chunks are visited in reverse. `d_` is a gradient.

  The summed log decay of a token enters as exp(sum) in the token's read and as exp(-sum) with its
  value. So its gradient is <d_read, read> - <v, d_v> of that token, which needs no product of
  [C, C] arrays; the last token's sum also enters the state after the chunk. Terms that no decay
  multiplies (a token's value in its own read, the last token's value in that state) would cancel
  up to rounding, which may far exceed the gradients of strong decays: both omit them.

  Args:
    blocks: the division of states into blocks.
    source: the source.
    count_1C: resets up to each token of the chunk, inclusive; None means none.
    dy_CX: the gradient of the sum of reads.
    d_final_BEN: the gradient of the last state; None means zero.
    before_XN: the state before the chunk.
    gradient: the source's gradients, outputs; for keys and queries, this block's share.
    states: the gradient dh_XN of the state after the chunk, replaced by that of the state before.
    semaphore: unused.
  """
  del semaphore  # All copies here are synchronous.
  (dh_XN,) = states
  d_initial_XN = blocks.states(gradient.initial_BEN)
  d_final_XN = None if d_final_BEN is None else blocks.states(d_final_BEN)

  @pl.when(pl.program_id(2) == 0)
  def _begin() -> None:
    if d_final_XN is None:
      dh_XN[...] = jnp.zeros_like(dh_XN)
    else:
      pltpu.sync_copy(d_final_XN, dh_XN)

  q_CN, k_CN, v_CX = source.q_BTK[...], source.k_BTK[...], source.v_BTE[...]
  dtype = jnp.result_type(q_CN, k_CN, v_CX)
  decays = _Decays(source.sum_BHG2C, None if count_1C is None else count_1C[...])
  scores_CC = _dot(q_CN, k_CN, (1, 1), dtype)
  carried_CX = _dot(q_CN, before_XN[...], (1, 1), dtype)
  d_kept_CX = _dot(k_CN, dh_XN[...], (1, 1), dtype)
  is_last_C1 = jax.lax.broadcasted_iota(jnp.int32, (len(q_CN), 1), 0) == len(q_CN) - 1
  itself_CC = decays.itself_CC()
  score_C1 = jnp.sum(jnp.where(itself_CC, scores_CC, 0.0), axis=1, keepdims=True)
  d_scores_CC = jnp.zeros_like(scores_CC)
  d_carried, kept, d_v, d_gate, d_sum = [], [], [], [], []
  for head in range(blocks.heads):
    v_CP = blocks.of(v_CX, head)
    dy_CP = blocks.of(dy_CX, head)
    d_read_CP = dy_CP
    if source.gate_BTE is not None:
      d_read_CP = dy_CP * blocks.of(source.gate_BTE, head).astype(jnp.float32)
    # Rounded once and used in both inner products, so that their common terms cancel.
    d_low_CP = d_read_CP.astype(dtype)
    decay_CC = decays.within_CC(head)
    weights_CC = jnp.where(itself_CC, 0.0, scores_CC * decay_CC).astype(dtype)
    read_CP = decays.from_start_C1[head] * blocks.of(carried_CX, head)
    read_CP += _dot(weights_CC, v_CP, (1, 0), dtype)
    to_end_CP = decays.to_end_C1[head] * blocks.of(d_kept_CX, head)
    d_kept_CP = jnp.where(is_last_C1, 0.0, to_end_CP)
    d_v_CP = _dot(weights_CC, d_low_CP, (0, 0), dtype) + d_kept_CP
    d_scores_CC += _dot(d_low_CP, v_CP, (1, 1), dtype) * decay_CC

    v_CP = v_CP.astype(jnp.float32)
    rows = pl.ds(head * blocks.width, blocks.width)
    d_last_11 = decays.whole_11[head] * _sum(dh_XN[rows] * before_XN[rows])
    d_last_11 += _sum(v_CP * d_kept_CP)
    d_sum_C1 = jnp.sum(d_low_CP * read_CP - v_CP * d_v_CP, axis=1, keepdims=True)
    d_sum.append(d_sum_C1 + jnp.where(is_last_C1, d_last_11, 0.0))
    d_carried.append(decays.from_start_C1[head] * d_read_CP)
    kept.append(decays.to_end_C1[head] * v_CP)
    d_v.append(d_v_CP + score_C1 * d_low_CP + jnp.where(is_last_C1, to_end_CP, 0.0))
    d_gate.append(dy_CP * (read_CP + score_C1 * v_CP))

  d_carried_CX, kept_CX = _joined(d_carried), _joined(kept)
  d_q_CN = _dot(d_scores_CC, k_CN, (1, 0), dtype)
  d_q_CN += _dot(d_carried_CX, before_XN[...], (1, 0), dtype)
  d_k_CN = _dot(d_scores_CC, q_CN, (0, 0), dtype) + _dot(kept_CX, dh_XN[...], (1, 0), dtype)
  gradient.q_BTK[...] = d_q_CN.astype(gradient.q_BTK.dtype)
  gradient.k_BTK[...] = d_k_CN.astype(gradient.k_BTK.dtype)
  gradient.v_BTE[...] = _joined(d_v).astype(gradient.v_BTE.dtype)
  if gradient.gate_BTE is not None:
    gradient.gate_BTE[...] = _joined(d_gate).astype(gradient.gate_BTE.dtype)
  _write_rows(d_sum, gradient.sum_BHG2C)
  _absorb(blocks, dh_XN, decays, _dot(d_carried_CX, q_CN, (0, 0), dtype))

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _end() -> None:
    pltpu.sync_copy(dh_XN, d_initial_XN)


def _sum(x: Array) -> Array:
  return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True)


def _write_rows(columns: Sequence[Array], rows_U1C: PyTree) -> None:
  """Writes columns [C, 1] as rows; see `_transposed`."""
  chunk = columns[0].shape[0]
  empty = -len(columns) % SUBLANES
  padding = [jnp.zeros((chunk, empty), jnp.float32)] if empty else []
  rows = jnp.concatenate([*columns, *padding], axis=1).T
  for head in range(len(columns)):
    rows_U1C[head] = rows[head : head + 1]
