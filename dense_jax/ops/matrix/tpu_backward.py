"""The backward kernel of matrix states: the gradients of all sources and of the epilogue.

The summed log decay of a token enters as exp(sum) in the token's read and as exp(-sum) with its
value. So its gradient is <d_read, read> - <v, d_v> of that token, which needs no product of
[C, C] arrays; the last token's sum also enters the state after the chunk. Terms that no decay
multiplies (a token's value in its own read, the last token's value in that state) would cancel
up to rounding, which may far exceed the gradients of strong decays: both omit them.

The epilogue's gradient needs the sum of all reads, which are computed again before any source's
gradients. `d_` is a gradient.
"""

import dataclasses

import jax
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
    sigmoid_and_silu,
    silu_slope,
    to_columns,
    write_rows,
)
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """A source's sums in VMEM: over chunks, or over the blocks of a set.

  Attributes:
    dh: the gradients of a set's states after the chunk, replaced by those of states before; this
      and `d_carried_CX` are None if the source joins.
    scores_CC: the scores of the chunk.
    d_scores_CC: their gradient.
    d_q_CN, d_k_CN: parts of the gradients of queries and keys.
    d_carried_CX: for each token, the gradient of what it reads of the carried state.
    kept_CX: what each token adds to the state after the chunk.
    d_gate_CX: the gradient of a low-rank gate before silu; this and the following are None if
      there is no such gate.
    d_hidden_CR: a part of the gradient of its hidden values.
    d_up_RX: the gradient of its matrix, for a set of blocks.
  """

  dh: PyTree
  scores_CC: PyTree
  d_scores_CC: PyTree
  d_q_CN: PyTree
  d_k_CN: PyTree
  d_carried_CX: PyTree
  kept_CX: PyTree
  d_gate_CX: PyTree
  d_hidden_CR: PyTree
  d_up_RX: PyTree


class _Source:
  """One source's chunk in the backward pass.

  Values of [C, P] are written at once: those of all heads together would fill VMEM, because a
  value of few lanes takes as much of it as one of LANES.

  A source that joins has a `leader`, which has the state of both, reads it, and has the gate.
  """

  def __init__(
      self, blocks: Blocks, place: Place, stream: Stream, count_1C: PyTree, before_XN: PyTree,
      d_final_BEN: PyTree, gradient: Stream, sums: Sums, end: int, leader: "_Source | None",
  ) -> None:
    self._blocks, self._place, self._stream, self._sums = blocks, place, stream, sums
    self._before_XN, self._gradient, self._leads = before_XN, gradient, leader is None
    self._members: list[_Source] = []
    if leader is not None:
      leader._members.append(self)

    @pl.when(place.is_first_chunk)
    def _begin() -> None:
      if leader is not None:
        return
      if d_final_BEN is None:
        sums.dh[place.set_rows] = jnp.zeros((blocks.rows, sums.dh.shape[1]), jnp.float32)
      else:
        pltpu.sync_copy(d_final_BEN.at[place.row, place.all_rows], sums.dh.at[place.set_rows])

      if sums.d_up_RX is not None:
        sums.d_up_RX[:, place.set_rows] = jnp.zeros((len(sums.d_up_RX), blocks.rows), jnp.float32)

    @pl.when(place.is_first_block)
    def _clear() -> None:
      for part in (sums.d_scores_CC, sums.d_q_CN, sums.d_k_CN, sums.d_hidden_CR):
        if part is not None:
          part[...] = jnp.zeros(part.shape, part.dtype)

    self.tokens = tokens = Tokens(blocks, place, stream, count_1C, sums.scores_CC)
    self._dh_XN: Array = sums.dh[place.set_rows] if leader is None else leader._dh_XN
    if leader is None:
      self._carried_CX = dot(tokens.q_CN, before_XN[...], (1, 1), tokens.dtype)
    self._d_kept_CX = dot(tokens.k_CN, self._dh_XN, (1, 1), tokens.dtype)
    self._itself_CC = tokens.itself_CC()
    chunk = len(tokens.q_CN)
    # Chunks are visited in reverse.
    last = jnp.where(place.is_first_chunk, end, chunk - 1)
    self._is_last_C1 = jax.lax.broadcasted_iota(jnp.int32, (chunk, 1), 0) == last
    self._score_C1 = jnp.sum(
        jnp.where(self._itself_CC, tokens.scores_CC, 0.0), axis=1, keepdims=True
    )
    self._gate_CX = stream.gate
    if isinstance(stream.gate, LowRank):
      self._before_gate_CX = stream.gate.before(place, tokens.dtype)
      self._gate_CX = sigmoid_and_silu(self._before_gate_CX)[1]
    self._d_sum: list[list[Array]] = []
    self._d_scale: list[list[Array]] = []

  def read(self, head: int) -> Array:
    """Computes the head's gated read with those of sources that join, [C, P]; float32."""
    members = [member._ungated(head) for member in self._members]
    self._all_CP = sum(members, start=self._ungated(head))
    return self._gated(self._all_CP, head)

  def _ungated(self, head: int) -> Array:
    tokens, blocks = self.tokens, self._blocks
    self._v_CP = tokens.value_CP(head)
    self._decay_CC = tokens.within_CC(head)
    weights_CC = jnp.where(self._itself_CC, 0.0, tokens.scores_CC * self._decay_CC)
    self._weights_CC = weights_CC.astype(tokens.dtype)
    # Of earlier tokens only.
    self._read_CP = dot(self._weights_CC, self._v_CP, (1, 0), tokens.dtype)
    if self._leads:
      self._read_CP += tokens.from_start_C1[head] * blocks.of(self._carried_CX, head)
    return self._read_CP + self._score_C1 * self._v_CP.astype(jnp.float32)

  def _gated(self, x_CP: Array, head: int) -> Array:
    if self._gate_CX is None:
      return x_CP
    return x_CP * self._blocks.of(self._gate_CX, head).astype(jnp.float32)

  def pull_back(self, d_CP: Array, d_x_CP: Array | None, head: int) -> None:
    """Computes a head's gradients, also of sources that join; `read` must come before.

    Args:
      d_CP: the gradient of the head's gated read.
      d_x_CP: what is added to that of its values; None means zero.
      head: its number.
    """
    blocks, gradient = self._blocks, self._gradient
    d_read_CP = self._gated(d_CP, head)
    self._pull_back(d_read_CP, d_x_CP, head)
    for member in self._members:
      member._pull_back(d_read_CP, None, head)
    if isinstance(gradient.gate, LowRank):
      d_gate_CP = d_CP * self._all_CP
      d_gate_CP *= silu_slope(blocks.of(self._before_gate_CX, head))
      blocks.put(self._sums.d_gate_CX, d_gate_CP, head)
    elif gradient.gate is not None:
      blocks.put(gradient.gate, d_CP * self._all_CP, head)

  def _pull_back(self, d_read_CP: Array, d_x_CP: Array | None, head: int) -> None:
    tokens, blocks, dtype = self.tokens, self._blocks, self.tokens.dtype
    sums, gradient = self._sums, self._gradient
    # Rounded once and used in both inner products, so that their common terms cancel.
    d_low_CP = d_read_CP.astype(dtype)
    to_end_CP = tokens.to_end_C1[head] * blocks.of(self._d_kept_CX, head)
    d_kept_CP = jnp.where(self._is_last_C1, 0.0, to_end_CP)
    d_v_CP = dot(self._weights_CC, d_low_CP, (0, 0), dtype) + d_kept_CP
    d_scores_CC = dot(d_low_CP, self._v_CP, (1, 1), dtype) * self._decay_CC
    sums.d_scores_CC[...] += d_scores_CC

    v_CP = self._v_CP.astype(jnp.float32)
    d_last_11 = _sum(v_CP * d_kept_CP)
    if self._leads:
      rows = slice(head * blocks.width, (head + 1) * blocks.width)
      before_PN = self._before_XN[rows].astype(jnp.float32)
      d_last_11 += tokens.whole_11[head] * _sum(self._dh_XN[rows] * before_PN)
      blocks.put(sums.d_carried_CX, tokens.from_start_C1[head] * d_read_CP, head)
    d_sum_C1 = jnp.sum(d_low_CP * self._read_CP - v_CP * d_v_CP, axis=1, keepdims=True)
    self._d_sum.append([d_sum_C1 + jnp.where(self._is_last_C1, d_last_11, 0.0)])
    blocks.put(sums.kept_CX, tokens.to_end_C1[head] * v_CP, head)
    d_v_CP += self._score_C1 * d_low_CP + jnp.where(self._is_last_C1, to_end_CP, 0.0)
    if self._stream.scale_BHG1C is not None:
      raw_CP = blocks.of(tokens.raw_CX, head).astype(jnp.float32)
      self._d_scale.append([jnp.sum(raw_CP * d_v_CP, axis=1, keepdims=True)])
    d_v_CP = tokens.scaled(d_v_CP, head)
    blocks.put(gradient.v_BTE, d_v_CP if d_x_CP is None else d_v_CP + d_x_CP, head)

  def finish(self) -> None:
    """Computes the gradients to which all heads contribute."""
    place, tokens, dtype = self._place, self.tokens, self.tokens.dtype
    sums, gradient = self._sums, self._gradient
    write_rows(self._d_sum, gradient.sum_BHG2C, place)
    if gradient.scale_BHG1C is not None:
      write_rows(self._d_scale, gradient.scale_BHG1C, place)

    sums.d_k_CN[...] += dot(sums.kept_CX[...], self._dh_XN, (1, 0), dtype)
    if self._leads:
      d_carried_CX = sums.d_carried_CX[...]
      sums.d_q_CN[...] += dot(d_carried_CX, self._before_XN[...], (1, 0), dtype)
      added_XN = dot(d_carried_CX, tokens.q_CN, (0, 0), dtype)
      sums.dh[place.set_rows] = tokens.decayed(self._dh_XN) + added_XN

    @pl.when(place.is_last_block)
    def _write_keys() -> None:
      d_scores_CC = sums.d_scores_CC[...]
      d_q_CN = sums.d_q_CN[...] + dot(d_scores_CC, tokens.k_CN, (1, 0), dtype)
      d_k_CN = sums.d_k_CN[...] + dot(d_scores_CC, tokens.q_CN, (0, 0), dtype)
      gradient.q_BTK[...] = d_q_CN.astype(gradient.q_BTK.dtype)
      gradient.k_BTK[...] = d_k_CN.astype(gradient.k_BTK.dtype)

    if isinstance(gradient.gate, LowRank):
      self._finish_gate(self._stream.gate, gradient.gate)

    if gradient.initial_BEN is not None:
      d_initial_XN = gradient.initial_BEN.at[place.row, place.all_rows]

      @pl.when(place.is_last_chunk)
      def _end() -> None:
        pltpu.sync_copy(sums.dh.at[place.set_rows], d_initial_XN)


  def _finish_gate(self, gate: LowRank, gradient: LowRank) -> None:
    place, sums, dtype = self._place, self._sums, self.tokens.dtype
    d_gate_CX, up_RX = sums.d_gate_CX[...], gate.up_RE[:, place.set_rows]
    sums.d_hidden_CR[...] += dot(d_gate_CX, up_RX, (1, 1), dtype)
    sums.d_up_RX[:, place.set_rows] += dot(gate.hidden_BTR[...], d_gate_CX, (0, 0), dtype)

    @pl.when(place.is_last_block)
    def _write_hidden() -> None:
      gradient.hidden_BTR[...] = sums.d_hidden_CR[...].astype(gradient.hidden_BTR.dtype)

    d_up_RX = gradient.up_RE.at[place.row, :, place.all_rows]

    @pl.when(place.is_last_chunk)
    def _write_up() -> None:
      pltpu.sync_copy(sums.d_up_RX.at[:, place.set_rows], d_up_RX)


class _Finish:
  """The epilogue's chunk in the backward pass."""

  def __init__(
      self, blocks: Blocks, finish: Finish, x_CX: Array, dy_CX: PyTree, d_moments_U2C: PyTree,
      gradient: Finish,
  ) -> None:
    self._blocks, self._finish, self._x_CX, self._dy_CX = blocks, finish, x_CX, dy_CX
    self._gradient = gradient
    self._d_moments: list[Array] = []
    if d_moments_U2C is not None:
      rows = [d_moments_U2C[head, i : i + 1] for head in range(blocks.heads) for i in range(2)]
      self._d_moments = to_columns(rows)

  def pull_back(self, y_CP: Array, head: int) -> tuple[Array, Array | None]:
    """Computes a head's gradients, given its read.

    Returns:
      The gradient of the read; and that of x if x is the first source's values, else None. Both
      are float32.
    """
    blocks, finish, gradient = self._blocks, self._finish, self._gradient
    d_CP = blocks.of(self._dy_CX, head).astype(jnp.float32)
    if finish.skip_1E is not None:
      x_CP = blocks.of(self._x_CX, head).astype(jnp.float32)
      skip_1P = blocks.of(finish.skip_1E, head)
      y_CP += skip_1P * x_CP
    gate_CP = None
    if finish.z_BTE is not None:
      z_CP = blocks.of(finish.z_BTE, head)
      gate_CP = sigmoid_and_silu(z_CP)[1]
    if self._d_moments:
      d_sum_C1, d_squares_C1 = self._d_moments[2 * head : 2 * head + 2]
      d_CP += d_sum_C1 + 2 * d_squares_C1 * (y_CP if gate_CP is None else y_CP * gate_CP)
    if gate_CP is not None:
      blocks.put(gradient.z_BTE, d_CP * y_CP * silu_slope(z_CP), head)
      d_CP *= gate_CP
    if finish.skip_1E is None:
      return d_CP, None
    blocks.put(gradient.skip_1E, jnp.sum(d_CP * x_CP, axis=0, keepdims=True), head)
    if finish.x_BTE is None:
      return d_CP, skip_1P * d_CP
    blocks.put(gradient.x_BTE, skip_1P * d_CP, head)
    return d_CP, None


def backward_kernel(
    blocks: Blocks,
    streams: tuple[Stream, ...],
    finish: Finish,
    count_1C: PyTree,
    dy_CX: PyTree,
    d_moments_U2C: PyTree,
    d_final_BEN: PyTree,
    before: PyTree,
    gradients: tuple[Stream, ...],
    d_finish: Finish,
    sums: tuple[Sums, ...],
    *,
    end: int,
) -> None:
  """Computes all gradients in a chunk; chunks are visited in reverse.

  Args:
    blocks: the division of states into blocks.
    streams: the sources.
    finish: the epilogue's arrays.
    count_1C: resets up to each token of the chunk, inclusive; None means none.
    dy_CX: the gradient of the result.
    d_moments_U2C: that of its moments; None means zero.
    d_final_BEN: that of the first source's last state; None means zero.
    before: each source's state before the chunk, before_XN; None for sources that join.
    gradients: the sources' gradients, outputs; for keys and queries, this set's share.
    d_finish: the epilogue's gradients, outputs.
    sums: each source's sums, in VMEM.
    end: the place of a row's last token in its chunk, where padding may follow.
  """
  place = Place.here(blocks)
  sources: list[_Source] = []
  leaders: list[_Source] = []
  for stream, before_XN, gradient, part in zip(streams, before, gradients, sums, strict=True):
    source = _Source(
        blocks, place, stream, count_1C, before_XN, None if sources else d_final_BEN, gradient,
        part, end, leaders[-1] if stream.joins else None,
    )
    sources.append(source)
    if not stream.joins:
      leaders.append(source)
  x_CX = sources[0].tokens.raw_CX if finish.x_BTE is None else finish.x_BTE[...]
  epilogue = _Finish(blocks, finish, x_CX, dy_CX, d_moments_U2C, d_finish)
  for head in range(blocks.heads):
    own_CP, *others = [leader.read(head) for leader in leaders]
    d_CP, d_x_CP = epilogue.pull_back(sum(others, start=own_CP), head)
    for index, leader in enumerate(leaders):
      leader.pull_back(d_CP, None if index else d_x_CP, head)
  for source in sources:
    source.finish()


def _sum(x: Array) -> Array:
  return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True)
