"""A layer's matrix states and those of its shallow sources, read in one pass on a TPU.

    h_t = a_t h_{t-1} + v_t k_t^T        y_t = sum over sources of gate_t * (h_t q_t)

The arithmetic is that of `dense_jax.ops.chunked_linear` (chunkwise form, arXiv 2307.08621,
section 2.3; heads that share keys, arXiv 2405.21060, section 7.2). What differs is where
things live: chunks are steps of a grid, states stay in VMEM from one chunk to the next, and
neither scores nor a source's own read are ever written to memory. Only differentiation saves
the states between chunks, once a source.

The rows of a state h_PN do not know of each other, so that a program of the grid takes a block
of rows: several heads of one group, which share scores, or a part of one head. What a group's
blocks contribute to the gradients of keys and queries is summed outside.

Letters of this file alone: X rows of the states in one block, U heads in it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dense_jax.ops.chunks import pad_time, split_time
from dense_jax.types import Array, PyTree

# Tokens a chunk: the side of the matrix unit.
DEFAULT_CHUNK = 128
# What a program may hold in VMEM by the estimate of `_blocks`, which leaves a part of the 16 MiB
# that compilers grant by default to what the compiler spills.
VMEM_BYTES = 11 * 2**20
_LANES, _SUBLANES = 128, 8
_CHUNK_MULTIPLE = 16  # Sublanes of a bfloat16 tile.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
  """One matrix-state recurrence and the question that it is asked.

  Attributes:
    q_BTJN: queries, bfloat16 or float32; head h takes those of group h // (H / J).
    k_BTJN: keys, zero at padding.
    v_BTHP: values.
    log_decay_BTH: float32, <= 0, zero at padding; its B may be 1 (a decay that all rows share).
    gate_BTHP: what the read is multiplied with; None is one.
    initial_BHPN: float32 state before the first token.
  """

  q_BTJN: Array
  k_BTJN: Array
  v_BTHP: Array
  log_decay_BTH: Array
  gate_BTHP: Array | None
  initial_BHPN: Array


def matrix_reads(
    sources: Sequence[Matrix],
    resets_BT: Array | None,
    *,
    chunk: int = 0,
    interpret: bool = False,
) -> tuple[Array, Array]:
  """The sum of all sources' gated reads, and the first source's last state.

  Differentiable by every float input; each gradient has its input's dtype.

  Args:
    sources: recurrences of equal shapes: the layer's own, then its shallow sources.
    resets_BT: bool, clears every source's state before a token; None never does.
    chunk: tokens a chunk, rounded up to a multiple of 16; 0 takes DEFAULT_CHUNK.
    interpret: runs the kernels as ordinary JAX, on any platform.

  Returns:
    y_BTHP and final_BHPN, both float32.
  """
  batch, time, groups, state_size = sources[0].k_BTJN.shape
  heads, channels = sources[0].v_BTHP.shape[2:]
  chex.assert_is_divisible(heads, groups)
  for source in sources:
    chex.assert_shape([source.q_BTJN, source.k_BTJN], (batch, time, groups, state_size))
    chex.assert_shape(source.v_BTHP, (batch, time, heads, channels))
    chex.assert_shape(source.log_decay_BTH, (None, time, heads))
    chex.assert_shape(source.initial_BHPN, (batch, heads, channels, state_size))
    chex.assert_type([source.log_decay_BTH, source.initial_BHPN], jnp.float32)
    if source.gate_BTHP is not None:
      chex.assert_equal_shape([source.gate_BTHP, source.v_BTHP])

  # A block of whole heads fills lanes, and a group's keys are lanes of their own.
  lanes = _LANES // min(heads // groups & -(heads // groups), _LANES // _SUBLANES)
  chunk = min(_round_up(chunk or DEFAULT_CHUNK, _CHUNK_MULTIPLE), _round_up(time, _CHUNK_MULTIPLE))
  plan = _Plan(
      batch=batch, chunks=-(-time // chunk), chunk=chunk, heads=heads, groups=groups,
      channels=_round_up(channels, lanes),
      state_size=_round_up(state_size, _LANES if groups > 1 else _SUBLANES),
      interpret=interpret,
  )
  count_BG1C = None
  if resets_BT is not None:
    # float32 is exact for counts, and transposes.
    count_BG1C = jnp.cumsum(split_time(resets_BT, chunk), axis=2, dtype=jnp.float32)[:, :, None]
  streams = tuple(_stream(plan, source) for source in sources)
  y_BTE, final_BEN = _reads(plan, streams, count_BG1C)
  y_BTHP = y_BTE.reshape(batch, -1, heads, plan.channels)[:, :time, :, :channels]
  final_BHPN = final_BEN.reshape(batch, heads, plan.channels, plan.state_size)
  return y_BTHP, final_BHPN[:, :, :channels, :state_size]


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Sizes that the kernels are compiled for; P, N and T are padded."""

  batch: int
  chunks: int
  chunk: int
  heads: int
  groups: int
  channels: int
  state_size: int
  interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Stream:
  """A source as the kernels take it; also that of references, blocks' specs and gradients.

  `cum_BHG1C` is the log decay, summed within each chunk.
  """

  q_BTK: PyTree
  k_BTK: PyTree
  v_BTE: PyTree
  cum_BHG1C: PyTree
  gate_BTE: PyTree
  initial_BEN: PyTree


def _stream(plan: _Plan, source: Matrix) -> _Stream:
  """Pads and joins axes, without a transposed copy of anything large."""

  def tokens(x_BTHP: Array, width: int) -> Array:
    extra = width - x_BTHP.shape[3]
    x_BTHP = jnp.pad(pad_time(x_BTHP, plan.chunk), ((0, 0), (0, 0), (0, 0), (0, extra)))
    return x_BTHP.reshape(*x_BTHP.shape[:2], -1)

  cum_BGCH = jnp.cumsum(split_time(source.log_decay_BTH, plan.chunk), axis=2)
  channels, state_size = source.initial_BHPN.shape[2:]
  extra = (plan.channels - channels, plan.state_size - state_size)
  initial_BHPN = jnp.pad(source.initial_BHPN, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1])))
  return _Stream(
      q_BTK=tokens(source.q_BTJN, plan.state_size),
      k_BTK=tokens(source.k_BTJN, plan.state_size),
      v_BTE=tokens(source.v_BTHP, plan.channels),
      cum_BHG1C=jnp.transpose(cum_BGCH, (0, 3, 1, 2))[:, :, :, None],
      gate_BTE=None if source.gate_BTHP is None else tokens(source.gate_BTHP, plan.channels),
      initial_BEN=initial_BHPN.reshape(plan.batch, -1, plan.state_size),
  )


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """How the H * P rows of a state are cut: `heads` times `width` of them a block."""

  heads: int
  width: int
  parts: int  # Blocks that a head is cut into.
  per_group: int
  count: int

  def of(self, x_CX: Array, head: int) -> Array:
    """The lanes of one of the block's heads."""
    return x_CX[:, head * self.width : (head + 1) * self.width]


def _blocks(plan: _Plan, states: int, tokens: int) -> _Blocks:
  """The largest blocks of rows that fit VMEM.

  Args:
    plan: the sizes.
    states: buffers of [X, N] in float32.
    tokens: buffers of [C, X] in float32.
  """
  group = plan.heads // plan.groups * plan.channels
  lanes = _round_up(plan.state_size, _LANES)
  row_bytes = 4 * (states * lanes + tokens * plan.chunk)
  # Scores, decays and the like, and blocks of keys and queries with their gradients.
  fixed_bytes = 4 * plan.chunk * (8 * _round_up(plan.chunk, _LANES) + 16 * lanes)
  fitting = [
      rows for rows in range(group, 0, -_SUBLANES)
      if group % rows == 0 and rows % _LANES == 0
      and (rows % plan.channels == 0 or plan.channels % rows == 0)
  ]
  rows = next((r for r in fitting if fixed_bytes + r * row_bytes <= VMEM_BYTES), fitting[-1])
  width = min(rows, plan.channels)
  return _Blocks(
      heads=rows // width, width=width, parts=plan.channels // width,
      per_group=group // rows, count=plan.groups * group // rows,
  )


class _Specs:
  """The blocks of arrays that a program (row of the batch, block of rows, chunk) sees."""

  def __init__(self, plan: _Plan, blocks: _Blocks, reverse: bool):
    rows, size = blocks.heads * blocks.width, plan.state_size
    per_group, parts = blocks.per_group, blocks.parts

    def at(g: int) -> int:
      return plan.chunks - 1 - g if reverse else g

    def cum(batch: int) -> pl.BlockSpec:
      return pl.BlockSpec(
          (None, blocks.heads, None, 1, plan.chunk),
          lambda b, i, g: (b if batch > 1 else 0, i // parts, at(g), 0, 0),
      )

    self.cum = cum
    self.keys = pl.BlockSpec((None, plan.chunk, size), lambda b, i, g: (b, at(g), i // per_group))
    self.values = pl.BlockSpec((None, plan.chunk, rows), lambda b, i, g: (b, at(g), i))
    self.state = pl.BlockSpec((None, rows, size), lambda b, i, g: (b, i, 0))
    self.between = pl.BlockSpec((None, None, rows, size), lambda b, i, g: (b, at(g), i, 0))
    self.count = pl.BlockSpec((None, None, 1, plan.chunk), lambda b, i, g: (b, at(g), 0, 0))
    # Gradients that several blocks contribute to.
    self.d_keys = pl.BlockSpec(
        (None, None, plan.chunk, size),
        lambda b, i, g: (i % per_group, b, at(g), i // per_group),
    )
    self.d_cum = pl.BlockSpec(
        (None, None, blocks.heads, None, 1, plan.chunk),
        lambda b, i, g: (i % parts, b, i // parts, at(g), 0, 0),
    )

  def stream(self, stream: _Stream) -> _Stream:
    return _Stream(
        q_BTK=self.keys, k_BTK=self.keys, v_BTE=self.values,
        cum_BHG1C=self.cum(stream.cum_BHG1C.shape[0]),
        gate_BTE=None if stream.gate_BTE is None else self.values, initial_BEN=self.state,
    )


def _dot(left: Array, right: Array, axes: tuple[int, int], dtype: jnp.dtype) -> Array:
  """Contracts one axis of each, in `dtype`; float32, and as exact as that when it is float32."""
  exact = dtype == jnp.float32
  return jax.lax.dot_general(
      left.astype(dtype), right.astype(dtype), (((axes[0],), (axes[1],)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
      preferred_element_type=jnp.float32,
  )


def _transposed(rows: Sequence[Array]) -> list[Array]:
  """Rows [1, C] as columns [C, 1]: one transposition of whole tiles."""
  empty = -len(rows) % _SUBLANES
  padding = [jnp.zeros((empty, rows[0].shape[1]), jnp.float32)] if empty else []
  columns = jnp.concatenate([*rows, *padding], axis=0).T
  return [columns[:, i : i + 1] for i in range(len(rows))]


class _Decays:
  """A chunk's decays for each head of a block; exponents are <= 0, and masked before exp.

  Attributes:
    from_start_C1: for each head, how much of the carried state each token sees.
    to_end_C1: how much of each token the state after the chunk has.
    whole_11: how much of the carried state it has.
  """

  def __init__(self, cum_U1C: PyTree, count_1C: Array | None):
    heads, _, chunk = cum_U1C.shape
    self._rows = [cum_U1C[head] for head in range(heads)]
    carried = None if count_1C is None else count_1C == 0
    kept = None if count_1C is None else count_1C == count_1C[:, chunk - 1 :]
    from_start = [_weight(carried, cum_1C) for cum_1C in self._rows]
    to_end = [_weight(kept, cum_1C[:, chunk - 1 :] - cum_1C) for cum_1C in self._rows]
    self.whole_11 = [weight_1C[:, chunk - 1 :] for weight_1C in from_start]

    counts = [] if count_1C is None else [count_1C]
    columns = _transposed([*self._rows, *from_start, *to_end, *counts])
    self._columns = columns[:heads]
    self.from_start_C1 = columns[heads : 2 * heads]
    self.to_end_C1 = columns[2 * heads : 3 * heads]
    query = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    key = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    self._sees = query >= key
    if count_1C is not None:
      self._sees &= columns[-1] == count_1C

  def within_CC(self, head: int) -> Array:
    """From the key's token (second) to the query's (first)."""
    return _weight(self._sees, self._columns[head] - self._rows[head])


def _weight(mask: Array | None, log_weight: Array) -> Array:
  """exp(log_weight) where `mask`, else 0."""
  return jnp.exp(log_weight if mask is None else jnp.where(mask, log_weight, -jnp.inf))


def _absorb(blocks: _Blocks, h_XN: PyTree, decays: _Decays, added_XN: Array) -> None:
  """h = decay over the chunk * h + added, in place."""
  for head, whole_11 in enumerate(decays.whole_11):
    rows = pl.ds(head * blocks.width, blocks.width)
    h_XN[rows] = whole_11 * h_XN[rows] + added_XN[head * blocks.width :][: blocks.width]


def _forward_source(
    blocks: _Blocks, source: _Stream, count_1C: Array | None, before_XN: PyTree, h_XN: PyTree
) -> Array:
  """One source's gated read of a chunk, [C, X]; takes its state over the chunk."""

  @pl.when(pl.program_id(2) == 0)
  def _begin() -> None:
    h_XN[...] = source.initial_BEN[...]

  if before_XN is not None:
    before_XN[...] = h_XN[...]
  q_CN, k_CN, v_CX = source.q_BTK[...], source.k_BTK[...], source.v_BTE[...]
  dtype = jnp.result_type(q_CN, k_CN, v_CX)
  decays = _Decays(source.cum_BHG1C, count_1C)
  scores_CC = _dot(q_CN, k_CN, (1, 1), dtype)
  carried_CX = _dot(q_CN, h_XN[...], (1, 1), dtype)
  reads, kept = [], []
  for head in range(blocks.heads):
    v_CP = blocks.of(v_CX, head)
    read_CP = _dot(scores_CC * decays.within_CC(head), v_CP, (1, 0), dtype)
    reads.append(read_CP + decays.from_start_C1[head] * blocks.of(carried_CX, head))
    kept.append(decays.to_end_C1[head] * v_CP.astype(jnp.float32))
  _absorb(blocks, h_XN, decays, _dot(_joined(kept), k_CN, (0, 0), dtype))
  y_CX = _joined(reads)
  gate_CX = source.gate_BTE
  return y_CX if gate_CX is None else y_CX * gate_CX[...].astype(jnp.float32)


def _joined(heads: list[Array]) -> Array:
  return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=1)


def _forward_kernel(
    blocks: _Blocks,
    streams: tuple[_Stream, ...],
    count_1C: PyTree,
    y_CX: PyTree,
    final_XN: PyTree,
    before: PyTree,
    states: PyTree,
) -> None:
  """All sources' reads of a chunk. The references are of a program's blocks (`_Specs`)."""
  count = None if count_1C is None else count_1C[...]
  y_CX[...] = sum(
      _forward_source(blocks, source, count, before_XN, h_XN)
      for source, before_XN, h_XN in zip(streams, before, states, strict=True)
  )

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _end() -> None:
    final_XN[...] = states[0][...]


def _backward_kernel(
    blocks: _Blocks,
    source: _Stream,
    count_1C: PyTree,
    dy_CX: PyTree,
    d_final_XN: PyTree,
    before_XN: PyTree,
    gradient: _Stream,
    states: PyTree,
) -> None:
  """One source's gradients in a chunk; chunks come last first.

  The log decays' gradient takes two facts: that of a token's sum as a query is
  <gradient of its read, its read>, as a key -<v, gradient of v>. What it does not take is a
  product of two [C, C] arrays a head.
  """

  (dh_XN,) = states

  @pl.when(pl.program_id(2) == 0)
  def _begin() -> None:
    dh_XN[...] = jnp.zeros_like(dh_XN) if d_final_XN is None else d_final_XN[...]

  q_CN, k_CN, v_CX = source.q_BTK[...], source.k_BTK[...], source.v_BTE[...]
  dtype = jnp.result_type(q_CN, k_CN, v_CX)
  decays = _Decays(source.cum_BHG1C, None if count_1C is None else count_1C[...])
  scores_CC = _dot(q_CN, k_CN, (1, 1), dtype)
  carried_CX = _dot(q_CN, before_XN[...], (1, 1), dtype)
  d_kept_CX = _dot(k_CN, dh_XN[...], (1, 1), dtype)
  is_last_C1 = jax.lax.broadcasted_iota(jnp.int32, (len(q_CN), 1), 0) == len(q_CN) - 1
  d_scores_CC = jnp.zeros_like(scores_CC)
  d_carried, kept, d_v, d_gate, d_cum = [], [], [], [], []
  for head in range(blocks.heads):
    v_CP = blocks.of(v_CX, head)
    dy_CP = blocks.of(dy_CX, head)
    d_read_CP = dy_CP
    if source.gate_BTE is not None:
      d_read_CP = dy_CP * blocks.of(source.gate_BTE, head).astype(jnp.float32)
    # Rounded once: what both facts have in common must cancel.
    d_low_CP = d_read_CP.astype(dtype)
    decay_CC = decays.within_CC(head)
    weights_CC = (scores_CC * decay_CC).astype(dtype)
    read_CP = decays.from_start_C1[head] * blocks.of(carried_CX, head)
    read_CP += _dot(weights_CC, v_CP, (1, 0), dtype)
    d_kept_CP = decays.to_end_C1[head] * blocks.of(d_kept_CX, head)
    d_v_CP = _dot(weights_CC, d_low_CP, (0, 0), dtype) + d_kept_CP
    d_scores_CC += _dot(d_low_CP, v_CP, (1, 1), dtype) * decay_CC

    v_CP = v_CP.astype(jnp.float32)
    rows = pl.ds(head * blocks.width, blocks.width)
    d_last_11 = decays.whole_11[head] * _sum(dh_XN[rows] * before_XN[rows])
    d_last_11 += _sum(v_CP * d_kept_CP)
    d_cum_C1 = jnp.sum(d_low_CP * read_CP - v_CP * d_v_CP, axis=1, keepdims=True)
    d_cum.append(d_cum_C1 + jnp.where(is_last_C1, d_last_11, 0.0))
    d_carried.append(decays.from_start_C1[head] * d_read_CP)
    kept.append(decays.to_end_C1[head] * v_CP)
    d_v.append(d_v_CP)
    d_gate.append(dy_CP * read_CP)

  d_carried_CX, kept_CX = _joined(d_carried), _joined(kept)
  d_q_CN = _dot(d_scores_CC, k_CN, (1, 0), dtype)
  d_q_CN += _dot(d_carried_CX, before_XN[...], (1, 0), dtype)
  d_k_CN = _dot(d_scores_CC, q_CN, (0, 0), dtype) + _dot(kept_CX, dh_XN[...], (1, 0), dtype)
  gradient.q_BTK[...] = d_q_CN.astype(gradient.q_BTK.dtype)
  gradient.k_BTK[...] = d_k_CN.astype(gradient.k_BTK.dtype)
  gradient.v_BTE[...] = _joined(d_v).astype(gradient.v_BTE.dtype)
  if gradient.gate_BTE is not None:
    gradient.gate_BTE[...] = _joined(d_gate).astype(gradient.gate_BTE.dtype)
  _write_rows(d_cum, gradient.cum_BHG1C)
  _absorb(blocks, dh_XN, decays, _dot(d_carried_CX, q_CN, (0, 0), dtype))

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _end() -> None:
    gradient.initial_BEN[...] = dh_XN[...]


def _sum(x: Array) -> Array:
  return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True)


def _write_rows(columns: Sequence[Array], rows_U1C: PyTree) -> None:
  """Columns [C, 1] as rows; see `_transposed`."""
  chunk = columns[0].shape[0]
  empty = -len(columns) % _SUBLANES
  padding = [jnp.zeros((chunk, empty), jnp.float32)] if empty else []
  rows = jnp.concatenate([*columns, *padding], axis=1).T
  for head in range(len(columns)):
    rows_U1C[head] = rows[head : head + 1]


def _cost(plan: _Plan, blocks: _Blocks, matmuls: tuple[int, int, int], arrays: PyTree):
  """Of matmuls [C, C] by N for each block, by P for each head, and of states by tokens."""
  by_keys, by_channels, states = matmuls
  tokens = plan.batch * plan.chunks * plan.chunk
  width, rows = plan.state_size, plan.heads * plan.channels
  return pl.CostEstimate(
      flops=2 * tokens * (
          plan.chunk * (by_keys * blocks.count * width + by_channels * rows) + states * rows * width
      ),
      transcendentals=tokens * plan.chunk * blocks.count * blocks.heads,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)),
  )


def _call(
    kernel: Callable[..., None],
    plan: _Plan,
    blocks: _Blocks,
    inputs: tuple[PyTree, PyTree],
    outputs: tuple[PyTree, PyTree],
    states: int,
    matmuls: tuple[int, int, int],
) -> PyTree:
  """Runs a kernel over rows of the batch, blocks of rows and, in order, chunks.

  Args:
    kernel: takes the blocks, then references of inputs, outputs and `states` of scratch.
    plan: the sizes.
    blocks: the blocks of rows.
    inputs: arrays and their specs.
    outputs: shapes and their specs.
    states: scratch buffers [X, N].
    matmuls: see `_cost`.
  """
  scratch = pltpu.VMEM((blocks.heads * blocks.width, plan.state_size), jnp.float32)
  return pl.pallas_call(
      functools.partial(kernel, blocks),
      grid=(plan.batch, blocks.count, plan.chunks),
      in_specs=inputs[1],
      out_specs=outputs[1],
      out_shape=outputs[0],
      scratch_shapes=[[scratch] * states],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      cost_estimate=_cost(plan, blocks, matmuls, (inputs[0], outputs[0])),
      interpret=plan.interpret,
  )(*inputs[0])


def _forward(
    plan: _Plan, streams: tuple[_Stream, ...], count_BG1C: Array | None, save: bool
) -> tuple[Array, Array, list[Array | None]]:
  """y_BTE, final_BEN of the first source and, if `save`, each source's states between chunks."""
  sources = len(streams)
  in_bytes = sum(x.dtype.itemsize for s in streams for x in (s.v_BTE, s.gate_BTE) if x is not None)
  # What moves is held twice. Five intermediate values of tokens, two of states.
  blocks = _blocks(
      plan, states=(5 if save else 3) * sources + 4, tokens=in_bytes // 2 + 2 + 5
  )
  specs = _Specs(plan, blocks, reverse=False)
  rows = plan.heads * plan.channels
  tokens = jax.ShapeDtypeStruct((plan.batch, plan.chunks * plan.chunk, rows), jnp.float32)
  state = jax.ShapeDtypeStruct((plan.batch, rows, plan.state_size), jnp.float32)
  between = jax.ShapeDtypeStruct((plan.batch, plan.chunks, *state.shape[1:]), jnp.float32)
  return _call(
      _forward_kernel, plan, blocks,
      ((streams, count_BG1C), (tuple(map(specs.stream, streams)), _given(count_BG1C, specs.count))),
      (
          (tokens, state, [between if save else None] * sources),
          (specs.values, specs.state, [specs.between if save else None] * sources),
      ),
      sources, (sources, sources, 2 * sources),
  )


def _given(x: Array | None, spec: pl.BlockSpec) -> pl.BlockSpec | None:
  return None if x is None else spec


def _backward(
    plan: _Plan,
    stream: _Stream,
    count_BG1C: Array | None,
    dy_BTE: Array,
    d_final_BEN: Array | None,
    before_BGEN: Array,
) -> _Stream:
  """One source's gradients."""
  gate_bytes = 0 if stream.gate_BTE is None else stream.gate_BTE.dtype.itemsize
  blocks = _blocks(plan, states=9, tokens=stream.v_BTE.dtype.itemsize + gate_bytes + 2 + 9)
  specs = _Specs(plan, blocks, reverse=True)

  def keys(x_BTK: Array) -> jax.ShapeDtypeStruct:
    # Sums are float32.
    dtype = x_BTK.dtype if blocks.per_group == 1 else jnp.float32
    return jax.ShapeDtypeStruct((blocks.per_group, *x_BTK.shape), dtype)

  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stream)
  cum_shape = (blocks.parts, plan.batch, *stream.cum_BHG1C.shape[1:])
  shapes = dataclasses.replace(
      shapes, q_BTK=keys(stream.q_BTK), k_BTK=keys(stream.k_BTK),
      cum_BHG1C=jax.ShapeDtypeStruct(cum_shape, jnp.float32),
  )
  stream_specs = specs.stream(stream)
  gradient = _call(
      _backward_kernel, plan, blocks,
      (
          (stream, count_BG1C, dy_BTE, d_final_BEN, before_BGEN),
          (
              stream_specs, _given(count_BG1C, specs.count), specs.values,
              _given(d_final_BEN, specs.state), specs.between,
          ),
      ),
      (
          shapes,
          dataclasses.replace(
              stream_specs, q_BTK=specs.d_keys, k_BTK=specs.d_keys, cum_BHG1C=specs.d_cum
          ),
      ),
      1, (3, 3, 5),
  )
  d_cum_BHG1C = jnp.sum(gradient.cum_BHG1C, axis=0)
  if stream.cum_BHG1C.shape[0] == 1:
    d_cum_BHG1C = jnp.sum(d_cum_BHG1C, axis=0, keepdims=True)
  return dataclasses.replace(
      gradient,
      q_BTK=jnp.sum(gradient.q_BTK, axis=0).astype(stream.q_BTK.dtype),
      k_BTK=jnp.sum(gradient.k_BTK, axis=0).astype(stream.k_BTK.dtype),
      cum_BHG1C=d_cum_BHG1C,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reads(
    plan: _Plan, streams: tuple[_Stream, ...], count_BG1C: Array | None
) -> tuple[Array, Array]:
  """`matrix_reads` of padded arrays."""
  y_BTE, final_BEN, _ = _forward(plan, streams, count_BG1C, save=False)
  return y_BTE, final_BEN


def _reads_forward(
    plan: _Plan, streams: tuple[_Stream, ...], count_BG1C: Array | None
) -> tuple[tuple[Array, Array], PyTree]:
  y_BTE, final_BEN, before = _forward(plan, streams, count_BG1C, save=True)
  return (y_BTE, final_BEN), (streams, count_BG1C, before)


def _reads_backward(
    plan: _Plan, saved: PyTree, gradients: tuple[Array, Array]
) -> tuple[tuple[_Stream, ...], None]:
  streams, count_BG1C, before = saved
  dy_BTE, d_final_BEN = gradients
  return tuple(
      _backward(plan, stream, count_BG1C, dy_BTE, None if index else d_final_BEN, before_BGEN)
      for index, (stream, before_BGEN) in enumerate(zip(streams, before, strict=True))
  ), None


_reads.defvjp(_reads_forward, _reads_backward)
