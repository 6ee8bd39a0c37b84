"""A layer's matrix states and those of its shallow sources, read in one pass on a GPU.

    h_t = a_t h_{t-1} + v_t k_t^T        y_t = sum over sources of gate_t * (h_t q_t)

and the epilogue of y. The arithmetic is that of `dense_jax.ops.matrix.chunked` (chunkwise form,
arXiv 2307.08621, section 2.3; heads that share keys, arXiv 2405.21060, section 7.2). The
difference is the memory: states stay in registers, and neither scores nor the reads of single
sources nor the read before its epilogue are written to memory. Three kernels:

| kernel             | a program takes           | it reads                  | it writes              |
|--------------------|---------------------------|---------------------------|------------------------|
| `forward_kernel`   | one row, a part of a head | all inputs                | result, states between |
|                    |                           |                           | chunks                 |
| `states_backward_` | the same, tiles reversed  | queries, gates, result    | gradients of the sum   |
| `kernel`           |                           | and its gradient          | of reads, of states    |
| `chunks_backward_` | a tile, a group of heads  | all inputs, result, states| gradients of inputs    |
| `kernel`           |                           | and gradients of both     |                        |

Why Triton, through Pallas. One kernel (a chunk's read) was written three ways. As Pallas-Triton it
took 20 lines, 255 registers and 148 KB of shared memory with 8 warps, and uses Hopper's wgmma and
asynchronous copies, which its compiler chooses; it runs interpreted on every jax here. As Mosaic
GPU it took 50 lines with explicit barriers, layouts and copies and 246 registers, runs on Hopper
alone, and neither of jax 0.10 and 0.12 interprets what compiles on 0.11 (0.10 has no public
interpreter, and `load` takes other arguments in 0.12). jax-triton needs Python 3.12 and cannot be
interpreted. jax has deprecated its Triton backend; the arithmetic below would move to another.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from dense_jax.ops.chunks import pad_time, split_time
from dense_jax.ops.epilogue import Output
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.ops.matrix.gpu_backward import TokenSums, chunks_backward_kernel
from dense_jax.ops.matrix.gpu_scan import forward_kernel, states_backward_kernel
from dense_jax.ops.matrix.gpu_tiles import Plan, Stream, Tail
from dense_jax.ops.matrix.log_decay import summed_log_decay
from dense_jax.types import Array, PyTree

# Tokens of a tile: the rows of Hopper's matrix unit for one group of warps.
TILE = 64
# Tokens per chunk. State traffic falls with it, and gradients inside chunks cost more.
DEFAULT_CHUNK = 128
# The least size of an axis of a matmul.
_LEAST = 16
# Most state numbers of one program of a scan: 128 registers a thread.
_STATE_NUMBERS = 8 * 32 * 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """One matrix-state recurrence, with the query of its read.

  Attributes:
    q_BTJN: queries, bfloat16 or float32; head h uses those of group h // (H / J).
    k_BTJN: keys, zero at padding.
    v_BTHP: values.
    scale_BTH: float32 factor of the values; None means 1.
    log_decay_BTH: float32, <= 0, zero at padding; its B may be 1 (a decay that all rows share).
    initial_BHPN: float32 state before the first token; None means zero.
    gate: the index of the read's gate; None means 1.
  """

  q_BTJN: Array
  k_BTJN: Array
  v_BTHP: Array
  scale_BTH: Array | None
  log_decay_BTH: Array
  initial_BHPN: Array | None
  gate: int | None = dataclasses.field(default=None, metadata={"static": True})


def matrix_finish(
    sources: Sequence[Source],
    gates: Sequence[Array],
    tail: Tail,
    resets_BT: Array | None,
    *,
    dtype: jnp.dtype,
    moments: bool = False,
    chunk: int = 0,
    interpret: bool = False,
) -> tuple[Output, Array]:
  """Computes the epilogue of the sum of all sources' gated reads, and the first one's last state.

  Differentiable in every float input; each gradient has its input's dtype.

  Args:
    sources: recurrences of equal shapes: the layer's own, then its shallow sources.
    gates: gates of reads, [B, T, E]; several sources may share one.
    tail: the arrays of the epilogue.
    resets_BT: bool, true where every state is cleared before the token; None means never.
    dtype: the dtype of the result.
    moments: whether the moments of each head are wanted.
    chunk: tokens per chunk, rounded up to a multiple of a tile; 0 means DEFAULT_CHUNK.
    interpret: true to run the kernels as ordinary JAX, on any platform.

  Returns:
    The result, its y [B, T, H, P], and final_BHPN, float32.
  """
  batch, time, groups, state_size = sources[0].k_BTJN.shape
  heads, channels = sources[0].v_BTHP.shape[2:]
  chex.assert_is_divisible(heads, groups)
  for source in sources:
    chex.assert_shape([source.q_BTJN, source.k_BTJN], (batch, time, groups, state_size))
    chex.assert_shape(source.v_BTHP, (batch, time, heads, channels))
    chex.assert_shape(source.log_decay_BTH, (None, time, heads))
    chex.assert_type(source.log_decay_BTH, jnp.float32)
    if source.initial_BHPN is not None:
      chex.assert_shape(source.initial_BHPN, (batch, heads, channels, state_size))
      chex.assert_type(source.initial_BHPN, jnp.float32)
  plan = _plan(sources, resets_BT, dtype, moments, chunk or DEFAULT_CHUNK, interpret)
  count_BT = None
  if resets_BT is not None:
    count_BT = jnp.cumsum(resets_BT, axis=1, dtype=jnp.int32)
    count_BT = jnp.pad(count_BT, ((0, 0), (0, plan.time - time)), mode="edge")

  def wide(x_BTE: Array | None) -> Array | None:
    if x_BTE is None:
      return None
    return _tokens(plan, x_BTE.reshape(batch, time, heads, channels), plan.channels)

  out_BTE, moments_BHA2T, final_BHPN = _finish(
      plan, tuple(_stream(plan, source) for source in sources), tuple(map(wide, gates)),
      Tail(tail.skip_H, wide(tail.x_BTE), wide(tail.z_BTE)), count_BT,
  )
  out_BTHP = out_BTE.reshape(batch, -1, heads, plan.channels)[:, :time, :, :channels]
  moments_BTH2 = None
  if moments_BHA2T is not None:
    moments_BTH2 = jnp.transpose(jnp.sum(moments_BHA2T, axis=2)[..., :time], (0, 3, 1, 2))
  return Output(out_BTHP, moments_BTH2), final_BHPN[:, :, :channels, :state_size]


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _power_of_two(size: int, limit: int) -> int:
  """Returns the largest power of two that divides `size` and is at most `limit`."""
  return min(size & -size, limit)


def _plan(
    sources: Sequence[Source], resets_BT: Array | None, dtype: jnp.dtype, moments: bool,
    chunk: int, interpret: bool,
) -> Plan:
  del resets_BT
  own = sources[0]
  batch, time, groups, state_size = own.k_BTJN.shape
  heads, channels = own.v_BTHP.shape[2:]
  tile = TILE
  while tile > _LEAST and tile // 2 >= min(chunk, time):
    tile //= 2
  chunk = min(_round_up(chunk, tile), _round_up(time, tile))
  channels, state_size = _round_up(channels, _LEAST), _round_up(state_size, _LEAST)
  width = _power_of_two(channels, 64)
  while width > _LEAST and len(sources) * state_size * width > _STATE_NUMBERS:
    width //= 2
  return Plan(
      batch=batch, chunks=-(-time // chunk), chunk=chunk, tile=tile, heads=heads, groups=groups,
      channels=channels, state_size=state_size, width=width,
      piece=_power_of_two(state_size, 128), gates=tuple(source.gate for source in sources),
      dtype=jnp.result_type(own.q_BTJN, own.k_BTJN, own.v_BTHP), out=jnp.dtype(dtype),
      moments=moments, shared_decay=own.log_decay_BTH.shape[0] == 1, interpret=interpret,
  )


def _tokens(plan: Plan, x_BTHP: Array, width: int) -> Array:
  """Pads time and the last axis, and merges the last two."""
  extra = width - x_BTHP.shape[3]
  x_BTHP = jnp.pad(pad_time(x_BTHP, plan.chunk), ((0, 0), (0, 0), (0, 0), (0, extra)))
  return x_BTHP.reshape(*x_BTHP.shape[:2], -1)


def _stream(plan: Plan, source: Source) -> Stream:
  """Pads, merges and transposes a source's arrays; those of every channel are not transposed."""

  def by_head(x_BTH: Array) -> Array:
    return jnp.swapaxes(x_BTH.reshape(x_BTH.shape[0], plan.time, plan.heads), 1, 2)

  sums = summed_log_decay(source.log_decay_BTH, plan.chunk)
  scale_BHT = initial_BHPN = None
  if source.scale_BTH is not None:
    scale_BHT = by_head(pad_time(source.scale_BTH.astype(jnp.float32), plan.chunk))
  if source.initial_BHPN is not None:
    channels, state_size = source.initial_BHPN.shape[2:]
    extra = (plan.channels - channels, plan.state_size - state_size)
    initial_BHPN = jnp.pad(source.initial_BHPN, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1])))
  return Stream(
      q_BTK=_tokens(plan, source.q_BTJN, plan.state_size),
      k_BTK=_tokens(plan, source.k_BTJN, plan.state_size),
      v_BTE=_tokens(plan, source.v_BTHP, plan.channels),
      scale_BHT=scale_BHT, high_BHT=by_head(sums.high), low_BHT=by_head(sums.low),
      initial_BHPN=initial_BHPN,
  )


class _Specs:
  """Block specs of a program: all tokens of a row, and a part of a head or a group of heads.

  Args:
    plan: the sizes.
    by_part: true if programs take parts of heads (grid: rows, parts of all heads), false if they
      take groups of heads (grid: rows, tiles, groups).
  """

  def __init__(self, plan: Plan, *, by_part: bool):
    # Unlike // and %, these need no case for negative numbers.
    div, rem = jax.lax.div, jax.lax.rem
    parts, per_group = plan.parts, plan.per_group
    time, chunks, size = plan.time, plan.chunks, plan.state_size
    if by_part:
      width, heads, keys = plan.width, (None,), lambda i, _: div(i, parts * per_group)
      head, part = lambda i, _: div(i, parts), lambda i, _: rem(i, parts)
      block, states, numbers = lambda i, _: i, (plan.width,), (None, None)
    else:
      width, heads, keys = per_group * plan.channels, (per_group,), lambda _, j: j
      head, part, block = keys, lambda *_: 0, keys
      states, numbers = (plan.channels,), (per_group, parts)

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
      return pl.BlockSpec(shape, lambda b, i, j=0: index(b, i, j))

    self.keys = spec((None, time, size), lambda b, i, j: (b, 0, keys(i, j)))
    self.values = spec((None, time, width), lambda b, i, j: (b, 0, block(i, j)))
    self.by_head = spec((None, *heads, time), lambda b, i, j: (b, head(i, j), 0))
    self.shared = spec((None, *heads, time), lambda b, i, j: (0, head(i, j), 0))
    self.count = spec((None, time), lambda b, i, j: (b, 0))
    self.skip = spec((plan.heads,), lambda b, i, j: (0,)) if by_part else spec(
        (per_group,), lambda b, i, j: (j,)
    )
    self.between = spec(
        (None, chunks, *heads, size, *states),
        lambda b, i, j: (b, 0, head(i, j), 0, part(i, j)),
    )
    self.state = spec(
        (None, *heads, *states, size), lambda b, i, j: (b, head(i, j), part(i, j), 0)
    )
    self.moments = spec(
        (None, *numbers, 2, time), lambda b, i, j: (b, head(i, j), part(i, j), 0, 0)
    )
    self.d_moments = spec((None, *heads, 2, time), lambda b, i, j: (b, head(i, j), 0, 0))
    self.sums = spec((None, *numbers, time), lambda b, i, j: (b, head(i, j), part(i, j), 0))
    self.numbers = spec((None, None, *numbers), lambda b, i, j: (b, i, head(i, j), part(i, j)))
    self.whole = spec(
        (None, None, *numbers),
        lambda b, i, j: (b, div(i, plan.tiles), head(i, j), part(i, j)),
    )
    self._decays = self.shared if plan.shared_decay else self.by_head

  def stream(self, stream: Stream) -> Stream:
    """Returns the specs of a source."""
    return Stream(
        q_BTK=self.keys, k_BTK=self.keys, v_BTE=self.values,
        scale_BHT=_if(stream.scale_BHT, self.by_head),
        high_BHT=self._decays, low_BHT=self._decays,
        initial_BHPN=_if(stream.initial_BHPN, self.state),
    )

  def tail(self, tail: Tail) -> Tail:
    """Returns the specs of an epilogue's arrays."""
    return Tail(
        _if(tail.skip_H, self.skip), _if(tail.x_BTE, self.values), _if(tail.z_BTE, self.values)
    )


def _if(x: PyTree, spec: PyTree) -> PyTree:
  """Returns the spec of an array that may be absent."""
  return None if x is None else spec


def _like(x: PyTree, dtype: jnp.dtype | None = None) -> PyTree:
  """Returns the shapes of a tree of arrays."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), x)


def _call(
    kernel: Callable[..., None],
    plan: Plan,
    grid: tuple[int, ...],
    inputs: PyTree,
    in_specs: PyTree,
    outputs: PyTree,
    out_specs: PyTree,
    *,
    matmul_flops: int,
    exponentials: int,
    warps: int,
    stages: int,
) -> PyTree:
  """Runs a kernel that takes `plan`, then references to inputs and outputs."""
  arrays = jax.tree.leaves((inputs, outputs))
  cost = KernelCost(
      matmul_flops=matmul_flops, flops=6 * exponentials, transcendentals=exponentials,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
  )
  with cost.scope():
    return pl.pallas_call(
        functools.partial(kernel, plan), grid=grid, in_specs=in_specs, out_specs=out_specs,
        out_shape=outputs, interpret=plan.interpret, cost_estimate=cost.estimate(),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
    )(*inputs)


def _between(plan: Plan) -> jax.ShapeDtypeStruct:
  shape = (plan.batch, plan.chunks, plan.heads, plan.state_size, plan.channels)
  return jax.ShapeDtypeStruct(shape, plan.dtype)


def _forward(
    plan: Plan, streams: tuple[Stream, ...], gates: tuple[Array, ...], tail: Tail,
    count_BT: Array | None,
) -> tuple[Array, Array | None, tuple[Array, ...], Array]:
  """Computes the result, its moments, all states between chunks and the first source's last."""
  specs, sources = _Specs(plan, by_part=True), len(streams)
  batch, time, size = plan.batch, plan.time, plan.state_size
  out_BTE = jax.ShapeDtypeStruct((batch, time, plan.heads * plan.channels), plan.out)
  moments_BHA2T = None
  if plan.moments:
    shape = (batch, plan.heads, plan.parts, 2, time)
    moments_BHA2T = jax.ShapeDtypeStruct(shape, jnp.float32)
  final_BHPN = jax.ShapeDtypeStruct((batch, plan.heads, plan.channels, size), jnp.float32)
  tokens = sources * batch * time * plan.heads * plan.parts
  return _call(
      forward_kernel, plan, (batch, plan.heads * plan.parts),
      (streams, gates, tail, count_BT),
      (
          tuple(map(specs.stream, streams)), tuple(specs.values for _ in gates), specs.tail(tail),
          _if(count_BT, specs.count),
      ),
      (out_BTE, moments_BHA2T, (_between(plan),) * sources, final_BHPN),
      (specs.values, _if(moments_BHA2T, specs.moments), (specs.between,) * sources, specs.state),
      matmul_flops=2 * tokens * (plan.tile * (size + plan.width) + 2 * size * plan.width),
      exponentials=tokens * plan.tile, warps=8, stages=plan.stages,
  )


def _backward(
    plan: Plan,
    saved: tuple[tuple[Stream, ...], tuple[Array, ...], Tail, Array | None],
    out_BTE: Array,
    before: tuple[Array, ...],
    d_out_BTE: Array,
    d_moments_BH2T: Array | None,
    d_final_BHPN: Array,
) -> tuple[tuple[Stream, ...], tuple[Array, ...], Tail]:
  """Computes all gradients."""
  streams, gates, tail, count_BT = saved
  d_y_BTE, d_after, d_initial = _states_backward(
      plan, saved, out_BTE, d_out_BTE, d_moments_BH2T, d_final_BHPN
  )
  if d_y_BTE is None:
    d_y_BTE = d_out_BTE
  if tail.z_BTE is None:
    out_BTE = d_out_BTE = d_moments_BH2T = None
  elif d_moments_BH2T is None:
    out_BTE = None
  plan = dataclasses.replace(plan, width=_power_of_two(plan.channels, 64))
  specs, sources = _Specs(plan, by_part=False), len(streams)
  batch, time, size, width = plan.batch, plan.time, plan.state_size, plan.width
  sums = jax.ShapeDtypeStruct((batch, plan.heads, plan.parts, time), jnp.float32)
  tiles = plan.chunks * plan.tiles
  numbers, whole = (
      jax.ShapeDtypeStruct((batch, count, plan.heads, plan.parts), jnp.float32)
      for count in (tiles, plan.chunks)
  )

  def written(stream: Stream) -> Stream:
    return dataclasses.replace(
        stream, scale_BHT=None, high_BHT=None, low_BHT=None, initial_BHPN=None
    )

  def token_sums(x: PyTree) -> tuple[TokenSums, ...]:
    return tuple(TokenSums(x, x, _if(stream.scale_BHT, x)) for stream in streams)

  in_specs = tuple(map(specs.stream, streams))
  streams_in = tuple(dataclasses.replace(stream, initial_BHPN=None) for stream in streams)
  specs_in = tuple(dataclasses.replace(stream, initial_BHPN=None) for stream in in_specs)
  gate_specs = tuple(specs.values for _ in gates)
  by_part = 2 * batch * time * plan.heads * plan.parts
  by_group = 2 * batch * time * plan.groups
  d_streams, d_gates, d_tail, sums, d_last, d_whole = _call(
      chunks_backward_kernel, plan, (batch, tiles, plan.groups),
      (
          streams_in, gates, tail, count_BT, out_BTE, d_out_BTE, d_moments_BH2T, d_y_BTE, before,
          d_after,
      ),
      (
          specs_in, gate_specs, specs.tail(tail), _if(count_BT, specs.count),
          _if(out_BTE, specs.values), _if(d_out_BTE, specs.values),
          _if(d_moments_BH2T, specs.d_moments), specs.values, (specs.between,) * sources,
          (specs.between,) * sources,
      ),
      (
          tuple(_like(written(stream)) for stream in streams), _like(gates),
          Tail(_if(tail.skip_H, numbers), _like(tail.x_BTE), _like(tail.z_BTE)),
          token_sums(sums), (numbers,) * sources, (whole,) * sources,
      ),
      (
          tuple(map(written, in_specs)), gate_specs,
          Tail(
              _if(tail.skip_H, specs.numbers), _if(tail.x_BTE, specs.values),
              _if(tail.z_BTE, specs.values),
          ),
          token_sums(specs.sums), (specs.numbers,) * sources, (specs.whole,) * sources,
      ),
      matmul_flops=sources * (
          by_part * width * (4 * plan.chunk + 4 * size) + by_group * 4 * plan.chunk * size
      ),
      exponentials=sources * batch * time * plan.heads * plan.parts * 3 * plan.chunk,
      warps=8, stages=1,
  )
  gradients = tuple(
      _gradient(plan, stream, d_stream, sums_, last, d_initial_BHPN)
      for stream, d_stream, sums_, *last, d_initial_BHPN in zip(
          streams, d_streams, sums, d_last, d_whole, d_initial, strict=True
      )
  )
  skip_H = None if tail.skip_H is None else jnp.sum(d_tail.skip_H, axis=(0, 1, 3))
  return gradients, d_gates, dataclasses.replace(d_tail, skip_H=skip_H)


def _states_backward(
    plan: Plan,
    saved: tuple[tuple[Stream, ...], tuple[Array, ...], Tail, Array | None],
    out_BTE: Array,
    d_out_BTE: Array,
    d_moments_BH2T: Array | None,
    d_final_BHPN: Array,
) -> tuple[Array | None, tuple[Array, ...], tuple[Array | None, ...]]:
  """Computes the gradients of the sum of reads, of states after chunks and of first states."""
  streams, gates, tail, count_BT = saved
  specs, sources = _Specs(plan, by_part=True), len(streams)
  d_y_BTE = None
  if tail.z_BTE is not None or d_moments_BH2T is not None:
    d_y_BTE = jax.ShapeDtypeStruct(d_out_BTE.shape, plan.dtype)
  if d_moments_BH2T is None:
    out_BTE = None
  initial = [stream.initial_BHPN for stream in streams]
  tokens = sources * plan.batch * plan.time * plan.heads * plan.parts
  # What this kernel does not read is not among its operands.
  streams_in = tuple(
      dataclasses.replace(stream, k_BTK=None, v_BTE=None, scale_BHT=None, initial_BHPN=None)
      for stream in streams
  )
  specs_in = tuple(
      dataclasses.replace(
          specs.stream(stream), k_BTK=None, v_BTE=None, scale_BHT=None, initial_BHPN=None
      )
      for stream in streams
  )
  return _call(
      states_backward_kernel, plan, (plan.batch, plan.heads * plan.parts),
      (
          streams_in, gates, tail.z_BTE, count_BT, out_BTE, d_out_BTE, d_moments_BH2T,
          d_final_BHPN,
      ),
      (
          specs_in, tuple(specs.values for _ in gates), _if(tail.z_BTE, specs.values),
          _if(count_BT, specs.count), _if(out_BTE, specs.values), specs.values,
          _if(d_moments_BH2T, specs.d_moments), specs.state,
      ),
      (d_y_BTE, (_between(plan),) * sources, tuple(_like(x) for x in initial)),
      (
          _if(d_y_BTE, specs.values), (specs.between,) * sources,
          tuple(_if(x, specs.state) for x in initial),
      ),
      matmul_flops=2 * tokens * plan.state_size * plan.width, exponentials=tokens,
      warps=8, stages=plan.stages,
  )


def _gradient(
    plan: Plan, stream: Stream, d_stream: Stream, sums: TokenSums, d_last: Sequence[Array],
    d_initial_BHPN: Array | None,
) -> Stream:
  """Returns a source's gradient."""
  d_low_BHT = jnp.sum(sums.read - sums.value, axis=2)
  d_last_BGH = sum(
      jnp.sum(d_BTHA.reshape(plan.batch, plan.chunks, -1, plan.heads, plan.parts), axis=(2, 4))
      for d_BTHA in d_last
  )
  is_last_C = jnp.arange(plan.chunk) == plan.chunk - 1
  d_last_BHGC = jnp.where(
      is_last_C[None, None, None], jnp.swapaxes(d_last_BGH, 1, 2)[..., None], 0.0
  )
  d_low_BHT += d_last_BHGC.reshape(d_low_BHT.shape)
  if plan.shared_decay:
    d_low_BHT = jnp.sum(d_low_BHT, axis=0, keepdims=True)
  return dataclasses.replace(
      d_stream, high_BHT=jnp.zeros_like(stream.high_BHT), low_BHT=d_low_BHT,
      scale_BHT=None if sums.scale is None else jnp.sum(sums.scale, axis=2),
      initial_BHPN=d_initial_BHPN,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _finish(
    plan: Plan, streams: tuple[Stream, ...], gates: tuple[Array, ...], tail: Tail,
    count_BT: Array | None,
) -> tuple[Array, Array | None, Array]:
  """Computes `matrix_finish` of padded arrays."""
  out_BTE, moments_BHA2T, _, final_BHPN = _forward(plan, streams, gates, tail, count_BT)
  return out_BTE, moments_BHA2T, final_BHPN


def _finish_forward(
    plan: Plan, streams: tuple[Stream, ...], gates: tuple[Array, ...], tail: Tail,
    count_BT: Array | None,
) -> tuple[tuple[Array, Array | None, Array], PyTree]:
  out_BTE, moments_BHA2T, before, final_BHPN = _forward(plan, streams, gates, tail, count_BT)
  saved = (streams, gates, tail, count_BT), out_BTE, before
  return (out_BTE, moments_BHA2T, final_BHPN), saved


def _finish_backward(
    plan: Plan, saved: PyTree, gradients: tuple[Array, Array | None, Array]
) -> tuple[tuple[Stream, ...], tuple[Array, ...], Tail, None]:
  inputs, out_BTE, before = saved
  d_out_BTE, d_moments_BHA2T, d_final_BHPN = gradients
  # Parts of a head are summed, so each has the gradient of their sum.
  d_moments_BH2T = None if d_moments_BHA2T is None else d_moments_BHA2T[:, :, 0]
  d_streams, d_gates, d_tail = _backward(
      plan, inputs, out_BTE, before, d_out_BTE, d_moments_BH2T, d_final_BHPN
  )
  return d_streams, d_gates, d_tail, None


_finish.defvjp(_finish_forward, _finish_backward)
