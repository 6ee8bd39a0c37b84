"""The calls of the GPU kernels of matrix states: their operands, results and costs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.ops.matrix.gpu_backward import chunks_backward_kernel
from dense_jax.ops.matrix.gpu_program import PartSums, TokenSums
from dense_jax.ops.matrix.gpu_scan import forward_kernel, scores_kernel, states_backward_kernel
from dense_jax.ops.matrix.gpu_specs import Gate, Specs, if_given
from dense_jax.ops.matrix.gpu_tiles import Plan, Stream, power_of_two
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array, PyTree

# Warps of every program.
_WARPS = 8


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


def _rounded(plan: Plan, gates: tuple[Gate, ...]) -> tuple[Gate, ...]:
  """Returns gates with low-rank ones' matrices in the dtype in which they are multiplied."""
  return tuple(
      dataclasses.replace(gate, up_RE=gate.up_RE.astype(plan.dtype))
      if isinstance(gate, LowRankGate) else gate
      for gate in gates
  )


def _gate_flops(plan: Plan, gates: tuple[Gate, ...]) -> int:
  ranks = sum(len(gate.up_RE) for gate in gates if isinstance(gate, LowRankGate))
  return 2 * plan.batch * plan.time * plan.heads * plan.channels * ranks


def _call_scores(plan: Plan, streams: tuple[Stream, ...]) -> tuple[Array, ...]:
  """Computes each source's products of queries and keys of one tile, [B, J, T, S]."""
  tokens = pl.BlockSpec((None, plan.tile, plan.state_size), lambda b, t, g: (b, t, g))
  products = pl.BlockSpec((None, None, plan.tile, plan.tile), lambda b, t, g: (b, g, t, 0))
  shape, sources = _float32(plan.batch, plan.groups, plan.time, plan.tile), len(streams)
  return _call(
      scores_kernel, plan, (plan.batch, plan.chunks * plan.tiles, plan.groups),
      [
          ([stream.q_BTK for stream in streams], [tokens] * sources),
          ([stream.k_BTK for stream in streams], [tokens] * sources),
      ],
      [((shape,) * sources, (products,) * sources)],
      matmul_flops=2 * sources * shape.size * plan.state_size, exponentials=0, stages=1,
  )[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
  """The results of the forward pass.

  Attributes:
    out_BTE: the epilogue's result.
    moments_BHA2T: its moments; None if they are not wanted.
    final_BHPN: the first source's last state.
    open_BTE: the result before its gate; None without a gate, or if it is not saved.
    reads: for each gate the sum of the reads that it multiplies, if saved.
    before: each source's states before each chunk, if saved.
  """

  out_BTE: Array
  moments_BHA2T: Array | None
  final_BHPN: Array
  open_BTE: Array | None
  reads: tuple[Array, ...]
  before: tuple[Array, ...]


def call_forward(
    plan: Plan, streams: tuple[Stream, ...], gates: tuple[Gate, ...], epilogue: Epilogue,
    count_BT: Array | None, *, save: bool,
) -> Forward:
  """Computes the forward pass; `save` asks for what the backward pass needs of it."""
  specs, sources = Specs(plan, by_part=True), len(streams)
  batch, time, size = plan.batch, plan.time, plan.state_size
  wide = (batch, time, plan.heads * plan.channels)
  open_BTE = moments_BHA2T = None
  if save and epilogue.z is not None:
    open_BTE = jax.ShapeDtypeStruct(wide, plan.dtype)
  if plan.moments:
    moments_BHA2T = _float32(batch, plan.heads, plan.parts, 2, time)
  reads = (jax.ShapeDtypeStruct(wide, plan.dtype),) * (len(gates) * save)
  before = (_between(plan),) * (sources * save)
  tokens = sources * batch * time * plan.heads * plan.parts
  scores = _call_scores(plan, streams)
  out_BTE, open_BTE, moments_BHA2T, reads, before, final_BHPN = _call(
      forward_kernel, plan, (batch, plan.heads * plan.parts),
      [
          (streams, tuple(map(specs.stream, streams))), (scores, (specs.scores,) * sources),
          (_rounded(plan, gates), tuple(map(specs.gate, gates))),
          (epilogue, specs.epilogue(epilogue)), (count_BT, if_given(count_BT, specs.count)),
      ],
      [
          (jax.ShapeDtypeStruct(wide, plan.out), specs.values),
          (open_BTE, if_given(open_BTE, specs.values)),
          (moments_BHA2T, if_given(moments_BHA2T, specs.moments)),
          (reads, (specs.values,) * len(reads)), (before, (specs.between,) * len(before)),
          (_float32(batch, plan.heads, plan.channels, size), specs.state),
      ],
      matmul_flops=2 * tokens * plan.width * (plan.tile + 2 * size) + _gate_flops(plan, gates),
      exponentials=tokens * plan.tile, stages=plan.stages,
  )
  return Forward(out_BTE, moments_BHA2T, final_BHPN, open_BTE, reads, before)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StatesBackward:
  """The gradients of what lies between the reads and the result, and of states.

  Attributes:
    y_BTE: of the sum of reads.
    z_BTE: of the epilogue's gate; None without a gate.
    reads: for each gate, of the reads that it multiplies.
    gates: of each gate, [B, T, E]; that of a low-rank gate is of its value before the activation.
    after: of each source's states after each chunk.
    initial: of each source's state before the first token; None where it was zero.
  """

  y_BTE: Array
  z_BTE: Array | None
  reads: tuple[Array, ...]
  gates: tuple[Array, ...]
  after: tuple[Array, ...]
  initial: tuple[Array | None, ...]


def call_states_backward(
    plan: Plan,
    streams: tuple[Stream, ...],
    gates: tuple[Gate, ...],
    z_BTE: Array | None,
    count_BT: Array | None,
    open_BTE: Array,
    reads: tuple[Array, ...],
    gradients: tuple[Array, Array | None, Array],
) -> StatesBackward:
  """Computes gradients of what lies between the reads and the result, and of states.

  Args:
    plan: the sizes.
    streams: the sources.
    gates: gates of reads.
    z_BTE: the epilogue's gate; None means no gate.
    count_BT: resets up to each token, inclusive; None means none.
    open_BTE: the epilogue's result before its gate.
    reads: for each gate the sum of the reads that it multiplies.
    gradients: of the result, of its moments, [B, H, 2, T], and of the first source's last state.
  """
  specs, sources = Specs(plan, by_part=True), len(streams)
  d_out_BTE, d_moments_BH2T, d_final_BHPN = gradients
  d_y_BTE = d_z_BTE = None
  if z_BTE is not None:
    d_z_BTE = jax.ShapeDtypeStruct(z_BTE.shape, z_BTE.dtype)
  if z_BTE is not None or d_moments_BH2T is not None:
    d_y_BTE = jax.ShapeDtypeStruct(d_out_BTE.shape, plan.dtype)
  opened = None if d_y_BTE is None else open_BTE
  initial = tuple(_like(stream.initial_BHPN) for stream in streams)
  tokens = sources * plan.batch * plan.time * plan.heads * plan.parts
  factors = tuple(gate.hidden_R if isinstance(gate, LowRankGate) else gate for gate in gates)
  d_factors = tuple(jax.ShapeDtypeStruct(d_out_BTE.shape, factor.dtype) for factor in factors)
  wide = (specs.values,) * len(gates)

  def asked(stream: Stream) -> Stream:
    """Drops what the kernel does not read."""
    return dataclasses.replace(
        stream, k_BTK=None, v_BTE=None, scale_BHT=None, initial_BHPN=None
    )

  found_BTE, found_z_BTE, d_reads, d_gates, d_after, d_initial = _call(
      states_backward_kernel, plan, (plan.batch, plan.heads * plan.parts),
      [
          (
              tuple(asked(stream) for stream in streams),
              tuple(asked(specs.stream(stream)) for stream in streams),
          ),
          (_rounded(plan, gates), tuple(map(specs.gate, gates))), (reads, wide),
          (z_BTE, if_given(z_BTE, specs.values)),
          (count_BT, if_given(count_BT, specs.count)), (opened, if_given(opened, specs.values)),
          (d_out_BTE, specs.values), (d_moments_BH2T, if_given(d_moments_BH2T, specs.d_moments)),
          (d_final_BHPN, specs.state),
      ],
      [
          (d_y_BTE, if_given(d_y_BTE, specs.values)), (d_z_BTE, if_given(d_z_BTE, specs.values)),
          (_like(reads), wide), (d_factors, wide),
          ((_between(plan),) * sources, (specs.between,) * sources),
          (initial, tuple(if_given(shape, specs.state) for shape in initial)),
      ],
      matmul_flops=2 * tokens * plan.state_size * plan.width + _gate_flops(plan, gates),
      exponentials=tokens, stages=plan.stages,
  )
  y_BTE = d_out_BTE if found_BTE is None else found_BTE
  return StatesBackward(y_BTE, found_z_BTE, d_reads, d_gates, d_after, d_initial)


def call_chunks_backward(
    plan: Plan,
    stream: Stream,
    epilogue: Epilogue | None,
    count_BT: Array | None,
    d_read_BTE: Array,
    d_y_BTE: Array | None,
    states: tuple[Array, Array],
) -> tuple[Stream, Array | None, TokenSums, PartSums]:
  """Computes one source's gradients.

  Args:
    plan: the sizes.
    stream: the source.
    epilogue: skip and what it multiplies, if the source is the layer's own.
    count_BT: resets up to each token, inclusive; None means none.
    d_read_BTE: the gradient of the source's read.
    d_y_BTE: the gradient of the sum of reads, if skip needs another than `d_read_BTE`.
    states: the states before each chunk, and the gradients of those after each.

  Returns:
    The outputs of `chunks_backward_kernel`.
  """
  plan = dataclasses.replace(plan, width=power_of_two(plan.channels, 64))
  specs, narrow_specs = (Specs(by, by_part=False) for by in (plan, plan.narrow))
  batch, time, size = plan.batch, plan.time, plan.state_size
  tiles = plan.chunks * plan.tiles
  parts, narrow = (plan.heads, plan.parts), (plan.heads, plan.narrow.parts)
  skips = epilogue is not None and epilogue.skip is not None
  x_BTE = None if epilogue is None else epilogue.x
  sums, last = _float32(batch, *narrow, time), _float32(batch, tiles, *narrow)
  shares = _float32(batch, *parts, plan.tiles + len(plan.pieces), time)
  stream = dataclasses.replace(stream, initial_BHPN=None)
  epilogue_spec = None if epilogue is None else specs.epilogue(epilogue)

  def written(stream: Stream) -> Stream:
    """Drops what the kernel gives no gradient of."""
    return dataclasses.replace(stream, scale_BHT=None, high_BHT=None, low_BHT=None)

  by_part = 2 * batch * time * plan.heads * plan.parts
  by_group = 2 * batch * time * plan.groups
  # Tokens of the chunk in the tile itself and in those that come earlier, or later, on average.
  seen = plan.tile * (plan.tiles + 1) // 2
  return _call(
      chunks_backward_kernel, plan, (batch, tiles, plan.groups),
      [
          (stream, specs.stream(stream)), (epilogue, epilogue_spec),
          (count_BT, if_given(count_BT, specs.count)), (d_read_BTE, specs.values),
          (d_y_BTE, if_given(d_y_BTE, specs.values)),
          (states[0], specs.between), (states[1], specs.between),
      ],
      [
          (_like(written(stream)), written(specs.stream(stream))),
          (_like(x_BTE), if_given(x_BTE, specs.values)),
          (
              TokenSums(shares, sums, if_given(stream.scale_BHT, sums)),
              TokenSums(
                  specs.shares, narrow_specs.sums, if_given(stream.scale_BHT, narrow_specs.sums)
              ),
          ),
          (
              PartSums(last, _float32(batch, plan.chunks, *parts), last if skips else None),
              PartSums(
                  narrow_specs.numbers, specs.whole, narrow_specs.numbers if skips else None
              ),
          ),
      ],
      # Gradients of scores of two tiles are computed twice, those of one tile once.
      matmul_flops=by_part * plan.width * (3 * (seen + size) - plan.tile)
      + by_group * 4 * seen * size,
      exponentials=by_part // 2 * (3 * seen - plan.tile), stages=1,
  )
