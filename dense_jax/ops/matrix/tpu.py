"""A layer's matrix states and those of its shallow sources, read in one pass on a TPU.

    h_t = a_t h_{t-1} + v_t k_t^T        y_t = sum over sources of gate_t * (h_t q_t)

The arithmetic is that of `dense_jax.ops.matrix.chunked` (chunkwise form, arXiv 2307.08621,
section 2.3; heads that share keys, arXiv 2405.21060, section 7.2). The difference is the memory:
chunks are steps of a grid, states stay in VMEM from one chunk to the next, and neither scores
nor the reads of single sources are written to HBM. Only under differentiation are the states
between chunks saved, once per source.

The rows of a state h_PN are independent of each other, so each program of the grid takes a block
of rows: several heads of one group, which share scores, or a part of one head. The blocks of a
group each contribute to the gradients of keys and queries, which are summed outside the kernel.

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
from dense_jax.ops.matrix.log_decay import summed_log_decay
from dense_jax.ops.matrix.tpu_kernels import (
    SUBLANES,
    Blocks,
    Stream,
    backward_kernel,
    forward_kernel,
)
from dense_jax.types import Array, PyTree

# Tokens per chunk: the side of the matrix unit.
DEFAULT_CHUNK = 128
# Limit of a program's VMEM by the estimate of `_blocks`. It leaves a part of the 16 MiB that
# compilers grant by default to what the compiler spills.
VMEM_BYTES = 14 * 2**20
_LANES = 128
_CHUNK_MULTIPLE = 16  # Sublanes of a bfloat16 tile.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
  """One matrix-state recurrence, with the query and gate of its read.

  Attributes:
    q_BTJN: queries, bfloat16 or float32; head h uses those of group h // (H / J).
    k_BTJN: keys, zero at padding.
    v_BTHP: values.
    log_decay_BTH: float32, <= 0, zero at padding; its B may be 1 (a decay that all rows share).
    gate_BTHP: factor of the read; None means 1.
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
  """Computes the sum of all sources' gated reads, and the first source's last state.

  Differentiable in every float input; each gradient has its input's dtype.

  Args:
    sources: recurrences of equal shapes: the layer's own, then its shallow sources.
    resets_BT: bool, true where every state is cleared before the token; None means never.
    chunk: tokens per chunk, rounded up to a multiple of 16; 0 means DEFAULT_CHUNK.
    interpret: true to run the kernels as ordinary JAX, on any platform.

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

  # The heads of a group together must fill whole tiles of lanes: the larger the power of two that
  # divides their number, the less each is padded. With several groups, each group's keys must too.
  together = heads // groups & -(heads // groups)
  lanes = _LANES // min(together, _LANES // SUBLANES)
  chunk = min(_round_up(chunk or DEFAULT_CHUNK, _CHUNK_MULTIPLE), _round_up(time, _CHUNK_MULTIPLE))
  plan = _Plan(
      batch=batch, chunks=-(-time // chunk), chunk=chunk, heads=heads, groups=groups,
      channels=_round_up(channels, lanes),
      state_size=_round_up(state_size, _LANES if groups > 1 else SUBLANES),
      interpret=interpret,
  )
  count_BG1C = None
  if resets_BT is not None:
    # float32 is exact for these counts, and the kernel can transpose it.
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

  @property
  def rows(self) -> int:
    """E, the rows of a state."""
    return self.heads * self.channels


def _stream(plan: _Plan, source: Matrix) -> Stream:
  """Pads and merges axes, without a transposed copy of any large array."""

  def tokens(x_BTHP: Array, width: int) -> Array:
    extra = width - x_BTHP.shape[3]
    x_BTHP = jnp.pad(pad_time(x_BTHP, plan.chunk), ((0, 0), (0, 0), (0, 0), (0, extra)))
    return x_BTHP.reshape(*x_BTHP.shape[:2], -1)

  sum_BGC2H = jnp.stack(jax.tree.leaves(summed_log_decay(source.log_decay_BTH, plan.chunk)), axis=3)
  channels, state_size = source.initial_BHPN.shape[2:]
  extra = (plan.channels - channels, plan.state_size - state_size)
  initial_BHPN = jnp.pad(source.initial_BHPN, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1])))
  return Stream(
      q_BTK=tokens(source.q_BTJN, plan.state_size),
      k_BTK=tokens(source.k_BTJN, plan.state_size),
      v_BTE=tokens(source.v_BTHP, plan.channels),
      sum_BHG2C=jnp.transpose(sum_BGC2H, (0, 4, 1, 3, 2)),
      gate_BTE=None if source.gate_BTHP is None else tokens(source.gate_BTHP, plan.channels),
      initial_BEN=initial_BHPN.reshape(plan.batch, -1, plan.state_size),
  )


def _blocks(
    plan: _Plan, stream: Stream, states: tuple[int, int], tokens: tuple[int, int]
) -> Blocks:
  """Chooses the largest blocks of rows that fit VMEM.

  Args:
    plan: the sizes.
    stream: a source, for its dtypes.
    states: numbers of float32 arrays [X, N]: in buffers, and as intermediate values.
    tokens: the same for arrays [C, X].
  """
  # Matmuls of float32 split each operand into three of bfloat16.
  spilled = 3 if jnp.result_type(stream.q_BTK, stream.k_BTK, stream.v_BTE) == jnp.float32 else 1
  group = plan.heads // plan.groups * plan.channels
  lanes = _round_up(plan.state_size, _LANES)
  row_bytes = 4 * (
      (states[0] + spilled * states[1]) * lanes + (tokens[0] + spilled * tokens[1]) * plan.chunk
  )
  # Arrays [C, C] such as scores and decays, and blocks of keys and queries with their gradients.
  fixed_bytes = 4 * plan.chunk * (8 * _round_up(plan.chunk, _LANES) + 10 * lanes)
  fitting = [
      rows for rows in range(group, 0, -SUBLANES)
      if group % rows == 0 and rows % _LANES == 0
      and (rows % plan.channels == 0 or plan.channels % rows == 0)
  ]
  rows = next((r for r in fitting if fixed_bytes + r * row_bytes <= VMEM_BYTES), fitting[-1])
  width = min(rows, plan.channels)
  return Blocks(
      heads=rows // width, width=width, parts=plan.channels // width,
      per_group=group // rows, count=plan.groups * group // rows,
  )


class _Specs:
  """Block specs of a program's arrays at row b of the batch, block i of state rows, chunk g."""

  def __init__(self, plan: _Plan, blocks: Blocks, *, reverse: bool):
    chunk, size = plan.chunk, plan.state_size
    # Unlike // and %, these compile for TPUs without knowing the sign of the operands.
    div, rem = jax.lax.div, jax.lax.rem

    def at(g: int) -> int:
      return plan.chunks - 1 - g if reverse else g

    def sums(batch: int) -> pl.BlockSpec:
      return pl.BlockSpec(
          (None, blocks.heads, None, 2, chunk),
          lambda b, i, g: (b if batch > 1 else 0, div(i, blocks.parts), at(g), 0, 0),
      )

    self._sums = sums
    self._keys = pl.BlockSpec(
        (None, chunk, size), lambda b, i, g: (b, at(g), div(i, blocks.per_group))
    )
    self.values = pl.BlockSpec((None, chunk, blocks.rows), lambda b, i, g: (b, at(g), i))
    self.between = pl.BlockSpec((None, None, blocks.rows, size), lambda b, i, g: (b, at(g), i, 0))
    self.count = pl.BlockSpec((None, None, 1, chunk), lambda b, i, g: (b, at(g), 0, 0))
    self.whole = pl.BlockSpec(memory_space=pl.ANY)
    # Gradients to which several blocks contribute have a leading axis of shares.
    self.d_keys = pl.BlockSpec(
        (None, None, chunk, size),
        lambda b, i, g: (rem(i, blocks.per_group), b, at(g), div(i, blocks.per_group)),
    )
    self.d_sum = pl.BlockSpec(
        (None, None, blocks.heads, None, 1, chunk),
        lambda b, i, g: (rem(i, blocks.parts), b, div(i, blocks.parts), at(g), 0, 0),
    )

  def stream(self, stream: Stream) -> Stream:
    return Stream(
        q_BTK=self._keys, k_BTK=self._keys, v_BTE=self.values,
        sum_BHG2C=self._sums(stream.sum_BHG2C.shape[0]),
        gate_BTE=None if stream.gate_BTE is None else self.values, initial_BEN=self.whole,
    )


def _call(
    kernel: Callable[..., None],
    plan: _Plan,
    blocks: Blocks,
    inputs: PyTree,
    in_specs: PyTree,
    outputs: PyTree,
    out_specs: PyTree,
    *,
    sources: int,
    matmuls: tuple[int, int, int],
) -> PyTree:
  """Runs a kernel over rows of the batch, blocks of state rows and, in order, chunks.

  Args:
    kernel: takes `blocks`, then references to inputs, outputs, one state [X, N] per source, and
      a semaphore.
    plan: the sizes.
    blocks: the division of states into blocks.
    inputs: the kernel's arguments.
    in_specs: their block specs.
    outputs: the results' shapes.
    out_specs: their block specs.
    sources: the number of sources that the kernel takes.
    matmuls: matmuls per source and chunk, for the cost estimate: [C, C] by N for each block,
      [C, C] by P for each head, and [C, N] by P for each head.
  """
  by_keys, by_channels, by_states = matmuls
  tokens = sources * plan.batch * plan.chunks * plan.chunk
  cost = pl.CostEstimate(
      flops=2 * tokens * (
          plan.chunk * (by_keys * blocks.count * plan.state_size + by_channels * plan.rows)
          + by_states * plan.rows * plan.state_size
      ),
      transcendentals=tokens * plan.chunk * blocks.count * blocks.heads,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs))),
  )
  state = pltpu.VMEM((blocks.rows, plan.state_size), jnp.float32)
  return pl.pallas_call(
      functools.partial(kernel, blocks),
      grid=(plan.batch, blocks.count, plan.chunks),
      in_specs=in_specs,
      out_specs=out_specs,
      out_shape=outputs,
      scratch_shapes=[[state] * sources, pltpu.SemaphoreType.DMA(())],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      cost_estimate=cost,
      interpret=plan.interpret,
  )(*inputs)


def _forward(
    plan: _Plan, streams: tuple[Stream, ...], count_BG1C: Array | None, *, save: bool
) -> tuple[Array, Array, list[Array | None]]:
  """Computes y_BTE, the first source's final_BEN and, if `save`, all states between chunks."""
  sources = len(streams)
  in_bytes = sum(x.dtype.itemsize for s in streams for x in (s.v_BTE, s.gate_BTE) if x is not None)
  # Streamed blocks are double-buffered: values and gates, y.
  blocks = _blocks(plan, streams[0], states=(sources, 2), tokens=(in_bytes // 2 + 2, 5))
  specs = _Specs(plan, blocks, reverse=False)
  tokens = (plan.batch, plan.chunks * plan.chunk, plan.rows)
  state = (plan.rows, plan.state_size)
  y_BTE, final_BEN = (
      jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (tokens, (plan.batch, *state))
  )
  before_BGEN = jax.ShapeDtypeStruct((plan.batch, plan.chunks, *state), jnp.float32)
  return _call(
      forward_kernel, plan, blocks,
      (streams, count_BG1C),
      (tuple(map(specs.stream, streams)), None if count_BG1C is None else specs.count),
      (y_BTE, final_BEN, [before_BGEN if save else None] * sources),
      (specs.values, specs.whole, [specs.whole if save else None] * sources),
      sources=sources, matmuls=(1, 1, 2),
  )


def _backward(
    plan: _Plan,
    stream: Stream,
    count_BG1C: Array | None,
    dy_BTE: Array,
    d_final_BEN: Array | None,
    before_BGEN: Array,
) -> Stream:
  """Computes one source's gradients. They do not depend on other sources, which would take VMEM."""
  in_bytes = sum(x.dtype.itemsize for x in (stream.v_BTE, stream.gate_BTE) if x is not None)
  # Streamed blocks are double-buffered: dy, values, gates and their gradients, states between.
  blocks = _blocks(plan, stream, states=(3, 2), tokens=(in_bytes + 2, 9))
  specs = _Specs(plan, blocks, reverse=True)
  in_specs = specs.stream(stream)
  out_specs = dataclasses.replace(
      in_specs, q_BTK=specs.d_keys, k_BTK=specs.d_keys, sum_BHG2C=specs.d_sum
  )

  def shares(x: Array, number: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of partial sums; they are float32 if there is more than one."""
    shape = (number, plan.batch, *x.shape[1:])
    return jax.ShapeDtypeStruct(shape, x.dtype if number == 1 else jnp.float32)

  shapes = dataclasses.replace(
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stream),
      q_BTK=shares(stream.q_BTK, blocks.per_group),
      k_BTK=shares(stream.k_BTK, blocks.per_group),
      sum_BHG2C=shares(stream.sum_BHG2C[..., 1:, :], blocks.parts),
  )
  gradient = _call(
      backward_kernel, plan, blocks,
      (stream, count_BG1C, dy_BTE, d_final_BEN, before_BGEN),
      (
          in_specs, None if count_BG1C is None else specs.count, specs.values,
          None if d_final_BEN is None else specs.whole, specs.between,
      ),
      shapes, out_specs,
      sources=1, matmuls=(3, 3, 5),
  )
  d_low_BHG1C = jnp.sum(gradient.sum_BHG2C, axis=0)
  if stream.sum_BHG2C.shape[0] < plan.batch:
    d_low_BHG1C = jnp.sum(d_low_BHG1C, axis=0, keepdims=True)
  return dataclasses.replace(
      gradient,
      q_BTK=jnp.sum(gradient.q_BTK, axis=0).astype(stream.q_BTK.dtype),
      k_BTK=jnp.sum(gradient.k_BTK, axis=0).astype(stream.k_BTK.dtype),
      sum_BHG2C=jnp.pad(d_low_BHG1C, ((0, 0), (0, 0), (0, 0), (1, 0), (0, 0))),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reads(
    plan: _Plan, streams: tuple[Stream, ...], count_BG1C: Array | None
) -> tuple[Array, Array]:
  """Computes `matrix_reads` of padded arrays."""
  y_BTE, final_BEN, _ = _forward(plan, streams, count_BG1C, save=False)
  return y_BTE, final_BEN


def _reads_forward(
    plan: _Plan, streams: tuple[Stream, ...], count_BG1C: Array | None
) -> tuple[tuple[Array, Array], PyTree]:
  y_BTE, final_BEN, before = _forward(plan, streams, count_BG1C, save=True)
  return (y_BTE, final_BEN), (streams, count_BG1C, before)


def _reads_backward(
    plan: _Plan, saved: PyTree, gradients: tuple[Array, Array]
) -> tuple[tuple[Stream, ...], None]:
  streams, count_BG1C, before = saved
  dy_BTE, d_final_BEN = gradients
  return tuple(
      _backward(plan, stream, count_BG1C, dy_BTE, None if index else d_final_BEN, before_BGEN)
      for index, (stream, before_BGEN) in enumerate(zip(streams, before, strict=True))
  ), None


_reads.defvjp(_reads_forward, _reads_backward)
