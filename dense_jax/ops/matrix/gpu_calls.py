"""The calls of the GPU kernels of matrix states: their operands, results, block specs and costs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.ops.matrix.gpu_backward import TokenSums, chunks_backward_kernel
from dense_jax.ops.matrix.gpu_scan import forward_kernel, states_backward_kernel
from dense_jax.ops.matrix.gpu_tiles import Plan, Stream, power_of_two
from dense_jax.types import Array, PyTree


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

  def epilogue(self, epilogue: Epilogue) -> Epilogue:
    """Returns the specs of an epilogue's arrays."""
    return dataclasses.replace(
        epilogue, skip=_if(epilogue.skip, self.skip), x=_if(epilogue.x, self.values),
        z=_if(epilogue.z, self.values),
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


def call_forward(
    plan: Plan, streams: tuple[Stream, ...], gates: tuple[Array, ...], epilogue: Epilogue,
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
      (streams, gates, epilogue, count_BT),
      (
          tuple(map(specs.stream, streams)), tuple(specs.values for _ in gates), specs.epilogue(epilogue),
          _if(count_BT, specs.count),
      ),
      (out_BTE, moments_BHA2T, (_between(plan),) * sources, final_BHPN),
      (specs.values, _if(moments_BHA2T, specs.moments), (specs.between,) * sources, specs.state),
      matmul_flops=2 * tokens * (plan.tile * (size + plan.width) + 2 * size * plan.width),
      exponentials=tokens * plan.tile, warps=8, stages=plan.stages,
  )


def call_backward(
    plan: Plan,
    saved: tuple[tuple[Stream, ...], tuple[Array, ...], Epilogue, Array | None],
    out_BTE: Array,
    before: tuple[Array, ...],
    d_out_BTE: Array,
    d_moments_BH2T: Array | None,
    d_final_BHPN: Array,
) -> tuple[tuple[Stream, ...], tuple[Array, ...], Epilogue]:
  """Computes all gradients."""
  streams, gates, epilogue, count_BT = saved
  d_y_BTE, d_after, d_initial = _states_backward(
      plan, saved, out_BTE, d_out_BTE, d_moments_BH2T, d_final_BHPN
  )
  if d_y_BTE is None:
    d_y_BTE = d_out_BTE
  if epilogue.z is None:
    out_BTE = d_out_BTE = d_moments_BH2T = None
  elif d_moments_BH2T is None:
    out_BTE = None
  plan = dataclasses.replace(plan, width=power_of_two(plan.channels, 64))
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
  d_streams, d_gates, d_epilogue, sums, d_last, d_whole = _call(
      chunks_backward_kernel, plan, (batch, tiles, plan.groups),
      (
          streams_in, gates, epilogue, count_BT, out_BTE, d_out_BTE, d_moments_BH2T, d_y_BTE, before,
          d_after,
      ),
      (
          specs_in, gate_specs, specs.epilogue(epilogue), _if(count_BT, specs.count),
          _if(out_BTE, specs.values), _if(d_out_BTE, specs.values),
          _if(d_moments_BH2T, specs.d_moments), specs.values, (specs.between,) * sources,
          (specs.between,) * sources,
      ),
      (
          tuple(_like(written(stream)) for stream in streams), _like(gates),
          dataclasses.replace(_like(epilogue), skip=_if(epilogue.skip, numbers)),
          token_sums(sums), (numbers,) * sources, (whole,) * sources,
      ),
      (
          tuple(map(written, in_specs)), gate_specs,
          dataclasses.replace(specs.epilogue(epilogue), skip=_if(epilogue.skip, specs.numbers)),
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
  if epilogue.skip is not None:
    d_epilogue = dataclasses.replace(d_epilogue, skip=jnp.sum(d_epilogue.skip, axis=(0, 1, 3)))
  return gradients, d_gates, d_epilogue


def _states_backward(
    plan: Plan,
    saved: tuple[tuple[Stream, ...], tuple[Array, ...], Epilogue, Array | None],
    out_BTE: Array,
    d_out_BTE: Array,
    d_moments_BH2T: Array | None,
    d_final_BHPN: Array,
) -> tuple[Array | None, tuple[Array, ...], tuple[Array | None, ...]]:
  """Computes the gradients of the sum of reads, of states after chunks and of first states."""
  streams, gates, epilogue, count_BT = saved
  specs, sources = _Specs(plan, by_part=True), len(streams)
  d_y_BTE = None
  if epilogue.z is not None or d_moments_BH2T is not None:
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
          streams_in, gates, epilogue.z, count_BT, out_BTE, d_out_BTE, d_moments_BH2T,
          d_final_BHPN,
      ),
      (
          specs_in, tuple(specs.values for _ in gates), _if(epilogue.z, specs.values),
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
