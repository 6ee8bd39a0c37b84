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
from dense_jax.ops.matrix.gpu_backward import PartSums, TokenSums, chunks_backward_kernel
from dense_jax.ops.matrix.gpu_scan import forward_kernel, states_backward_kernel
from dense_jax.ops.matrix.gpu_tiles import Plan, Stream, power_of_two
from dense_jax.types import Array, PyTree

# Warps of every program.
_WARPS = 8


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
    index: Callable[[PyTree, PyTree], tuple[PyTree, ...]]
    heads: tuple[int | None, ...]
    numbers: tuple[int | None, ...]
    if by_part:
      width, channels, heads, numbers = plan.width, plan.width, (None,), (None, None)
      # The group, the head, the part of a head, and the part among those of all heads.
      index = lambda i, j: (div(i, parts * per_group), div(i, parts), rem(i, parts), i)  # noqa: E731
    else:
      width, channels, heads = per_group * plan.channels, plan.channels, (per_group,)
      numbers, index = (per_group, parts), lambda i, j: (j, j, 0, j)

    def spec(shape: tuple[int | None, ...], at: Callable[..., tuple[PyTree, ...]]) -> pl.BlockSpec:
      return pl.BlockSpec(shape, lambda b, i, j=0: at(b, i, *index(i, j)))

    # b: the row, t: the tile, g: the group, h: the head, p: the part of a head, x: that of all.
    self.keys = spec((None, time, size), lambda b, t, g, h, p, x: (b, 0, g))
    self.values = spec((None, time, width), lambda b, t, g, h, p, x: (b, 0, x))
    self.by_head = spec((None, *heads, time), lambda b, t, g, h, p, x: (b, h, 0))
    self.shared = spec((None, *heads, time), lambda b, t, g, h, p, x: (0, h, 0))
    self.count = spec((None, time), lambda b, t, g, h, p, x: (b, 0))
    self.skip = spec(
        (plan.heads if by_part else per_group,),
        lambda b, t, g, h, p, x: (0 if by_part else g,),
    )
    self.between = spec(
        (None, chunks, *heads, size, channels), lambda b, t, g, h, p, x: (b, 0, h, 0, p)
    )
    self.state = spec((None, *heads, channels, size), lambda b, t, g, h, p, x: (b, h, p, 0))
    self.moments = spec((None, *numbers, 2, time), lambda b, t, g, h, p, x: (b, h, p, 0, 0))
    self.d_moments = spec((None, *heads, 2, time), lambda b, t, g, h, p, x: (b, h, 0, 0))
    self.sums = spec((None, *numbers, time), lambda b, t, g, h, p, x: (b, h, p, 0))
    self.numbers = spec((None, None, *numbers), lambda b, t, g, h, p, x: (b, t, h, p))
    self.whole = spec(
        (None, None, *numbers), lambda b, t, g, h, p, x: (b, div(t, plan.tiles), h, p)
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


def _like(x: PyTree) -> PyTree:
  """Returns the shapes of a tree of arrays."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)


def _call(
    kernel: Callable[..., None],
    plan: Plan,
    grid: tuple[int, ...],
    inputs: Sequence[tuple[PyTree, PyTree]],
    outputs: Sequence[tuple[PyTree, PyTree]],
    *,
    matmul_flops: int,
    exponentials: int,
    stages: int,
) -> PyTree:
  """Runs a kernel that takes `plan`, then references to inputs and outputs.

  Args:
    kernel: the kernel.
    plan: the sizes.
    grid: the numbers of programs.
    inputs: trees of arrays, each with its tree of block specs.
    outputs: trees of shapes, each with its tree of block specs.
    matmul_flops: operations in matmuls.
    exponentials: exponentials, each of a difference of two sums of two parts.
    stages: tiles in shared memory at a time.

  Returns:
    The outputs.
  """
  arrays, in_specs = zip(*inputs, strict=True)
  shapes, out_specs = zip(*outputs, strict=True)
  cost = KernelCost(
      matmul_flops=matmul_flops, flops=6 * exponentials, transcendentals=exponentials,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, shapes))),
  )
  with cost.scope():
    return pl.pallas_call(
        functools.partial(kernel, plan), grid=grid, in_specs=in_specs, out_specs=out_specs,
        out_shape=shapes, interpret=plan.interpret, cost_estimate=cost.estimate(),
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=stages),
    )(*arrays)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _between(plan: Plan) -> jax.ShapeDtypeStruct:
  shape = (plan.batch, plan.chunks, plan.heads, plan.state_size, plan.channels)
  return jax.ShapeDtypeStruct(shape, plan.dtype)


def call_forward(
    plan: Plan, streams: tuple[Stream, ...], gates: tuple[Array, ...], epilogue: Epilogue,
    count_BT: Array | None,
) -> tuple[Array, Array | None, Array | None, tuple[Array, ...], Array]:
  """Computes the results of the forward pass.

  Returns:
    The epilogue's result, the result before its gate (None without a gate), its moments, all
    states between chunks, and the first source's last state.
  """
  specs, sources = _Specs(plan, by_part=True), len(streams)
  batch, time, size = plan.batch, plan.time, plan.state_size
  wide = (batch, time, plan.heads * plan.channels)
  open_BTE = moments_BHA2T = None
  if epilogue.z is not None:
    open_BTE = jax.ShapeDtypeStruct(wide, plan.dtype)
  if plan.moments:
    moments_BHA2T = _float32(batch, plan.heads, plan.parts, 2, time)
  tokens = sources * batch * time * plan.heads * plan.parts
  return _call(
      forward_kernel, plan, (batch, plan.heads * plan.parts),
      [
          (streams, tuple(map(specs.stream, streams))), (gates, (specs.values,) * len(gates)),
          (epilogue, specs.epilogue(epilogue)), (count_BT, _if(count_BT, specs.count)),
      ],
      [
          (jax.ShapeDtypeStruct(wide, plan.out), specs.values),
          (open_BTE, _if(open_BTE, specs.values)),
          (moments_BHA2T, _if(moments_BHA2T, specs.moments)),
          ((_between(plan),) * sources, (specs.between,) * sources),
          (_float32(batch, plan.heads, plan.channels, size), specs.state),
      ],
      matmul_flops=2 * tokens * (plan.tile * (size + plan.width) + 2 * size * plan.width),
      exponentials=tokens * plan.tile, stages=plan.stages,
  )


def call_states_backward(
    plan: Plan,
    streams: tuple[Stream, ...],
    gates: tuple[Array, ...],
    z_BTE: Array | None,
    count_BT: Array | None,
    open_BTE: Array,
    gradients: tuple[Array, Array | None, Array],
) -> tuple[Array, Array | None, tuple[Array, ...], tuple[Array | None, ...]]:
  """Computes gradients of what lies between the reads and the result, and of states.

  Args:
    plan: the sizes.
    streams: the sources.
    gates: gates of reads.
    z_BTE: the epilogue's gate; None means no gate.
    count_BT: resets up to each token, inclusive; None means none.
    open_BTE: the epilogue's result before its gate.
    gradients: of the result, of its moments, [B, H, 2, T], and of the first source's last state.

  Returns:
    The gradients of the sum of reads, of `z_BTE`, of the states after each chunk, and of the
    states before the first token.
  """
  specs, sources = _Specs(plan, by_part=True), len(streams)
  d_out_BTE, d_moments_BH2T, d_final_BHPN = gradients
  d_y_BTE = d_z_BTE = None
  if z_BTE is not None:
    d_z_BTE = jax.ShapeDtypeStruct(z_BTE.shape, z_BTE.dtype)
  if z_BTE is not None or d_moments_BH2T is not None:
    d_y_BTE = jax.ShapeDtypeStruct(d_out_BTE.shape, plan.dtype)
  opened = None if d_y_BTE is None else open_BTE
  initial = tuple(_like(stream.initial_BHPN) for stream in streams)
  tokens = sources * plan.batch * plan.time * plan.heads * plan.parts

  def asked(stream: Stream) -> Stream:
    """Drops what the kernel does not read."""
    return dataclasses.replace(
        stream, k_BTK=None, v_BTE=None, scale_BHT=None, initial_BHPN=None
    )

  found_BTE, d_z_BTE, d_after, d_initial = _call(
      states_backward_kernel, plan, (plan.batch, plan.heads * plan.parts),
      [
          (
              tuple(asked(stream) for stream in streams),
              tuple(asked(specs.stream(stream)) for stream in streams),
          ),
          (gates, (specs.values,) * len(gates)), (z_BTE, _if(z_BTE, specs.values)),
          (count_BT, _if(count_BT, specs.count)), (opened, _if(opened, specs.values)),
          (d_out_BTE, specs.values), (d_moments_BH2T, _if(d_moments_BH2T, specs.d_moments)),
          (d_final_BHPN, specs.state),
      ],
      [
          (d_y_BTE, _if(d_y_BTE, specs.values)), (d_z_BTE, _if(d_z_BTE, specs.values)),
          ((_between(plan),) * sources, (specs.between,) * sources),
          (initial, tuple(_if(shape, specs.state) for shape in initial)),
      ],
      matmul_flops=2 * tokens * plan.state_size * plan.width, exponentials=tokens,
      stages=plan.stages,
  )
  return d_out_BTE if found_BTE is None else found_BTE, d_z_BTE, d_after, d_initial


def call_chunks_backward(
    plan: Plan,
    stream: Stream,
    gate_BTE: Array | None,
    epilogue: Epilogue | None,
    count_BT: Array | None,
    d_y_BTE: Array,
    states: tuple[Array, Array],
) -> tuple[Stream, Array | None, Array | None, TokenSums, PartSums]:
  """Computes one source's gradients.

  Args:
    plan: the sizes.
    stream: the source.
    gate_BTE: the gate of its read; None means 1.
    epilogue: skip and what it multiplies, if the source is the layer's own.
    count_BT: resets up to each token, inclusive; None means none.
    d_y_BTE: the gradient of the sum of reads.
    states: the states before each chunk, and the gradients of those after each.

  Returns:
    The outputs of `chunks_backward_kernel`.
  """
  plan = dataclasses.replace(plan, width=power_of_two(plan.channels, 64))
  specs = _Specs(plan, by_part=False)
  batch, time, size = plan.batch, plan.time, plan.state_size
  tiles, parts = plan.chunks * plan.tiles, (plan.heads, plan.parts)
  skips = epilogue is not None and epilogue.skip is not None
  x_BTE = None if epilogue is None else epilogue.x
  sums, last = _float32(batch, *parts, time), _float32(batch, tiles, *parts)
  stream = dataclasses.replace(stream, initial_BHPN=None)
  epilogue_spec = None if epilogue is None else specs.epilogue(epilogue)

  def written(stream: Stream) -> Stream:
    """Drops what the kernel gives no gradient of."""
    return dataclasses.replace(stream, scale_BHT=None, high_BHT=None, low_BHT=None)

  by_part = 2 * batch * time * plan.heads * plan.parts
  by_group = 2 * batch * time * plan.groups
  return _call(
      chunks_backward_kernel, plan, (batch, tiles, plan.groups),
      [
          (stream, specs.stream(stream)), (gate_BTE, _if(gate_BTE, specs.values)),
          (epilogue, epilogue_spec), (count_BT, _if(count_BT, specs.count)),
          (d_y_BTE, specs.values), (states[0], specs.between), (states[1], specs.between),
      ],
      [
          (_like(written(stream)), written(specs.stream(stream))),
          (_like(gate_BTE), _if(gate_BTE, specs.values)),
          (_like(x_BTE), _if(x_BTE, specs.values)),
          (
              TokenSums(sums, sums, _if(stream.scale_BHT, sums)),
              TokenSums(specs.sums, specs.sums, _if(stream.scale_BHT, specs.sums)),
          ),
          (
              PartSums(last, _float32(batch, plan.chunks, *parts), last if skips else None),
              PartSums(specs.numbers, specs.whole, specs.numbers if skips else None),
          ),
      ],
      matmul_flops=by_part * plan.width * 4 * (plan.chunk + size)
      + by_group * 4 * plan.chunk * size,
      exponentials=by_part // 2 * 4 * plan.chunk, stages=1,
  )
