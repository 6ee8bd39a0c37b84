"""The calls of the GPU kernels of matrix states: their operands, results and costs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.ops.matrix.gpu_backward import chunks_backward_kernel
from dense_jax.ops.matrix.gpu_program import PartSums, TokenSums
from dense_jax.ops.matrix.gpu_scan import (
    forward_kernel,
    read_backward_kernel,
    read_kernel,
    scores_kernel,
    states_backward_kernel,
)
from dense_jax.ops.matrix.gpu_specs import Gate, Specs, if_given
from dense_jax.ops.matrix.gpu_tiles import Plan, Stream, power_of_two
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array, PyTree

# Warps of every program.
_WARPS = 8
BACK_STAGES = 1


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
    stages: chunks in shared memory at a time.

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
  """Computes each source's products of queries and keys of one chunk, [B, J, T, S]."""
  tokens = pl.BlockSpec((None, plan.chunk, plan.state_size), lambda b, t, g: (b, t, g))
  products = pl.BlockSpec((None, None, plan.chunk, plan.chunk), lambda b, t, g: (b, g, t, 0))
  shape, sources = _float32(plan.batch, plan.groups, plan.time, plan.chunk), len(streams)
  return _call(
      scores_kernel, plan, (plan.batch, plan.chunks, plan.groups),
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
  specs = Specs(plan, by_part=True)
  batch, time, size = plan.batch, plan.time, plan.state_size
  wide = jax.ShapeDtypeStruct((batch, time, plan.heads * plan.channels), plan.dtype)
  scores = _call_scores(plan, streams)
  state, count = _between(plan) if save else None, (count_BT, if_given(count_BT, specs.count))
  before_spec = if_given(state, specs.between)
  tokens = batch * time * plan.heads * plan.parts
  work: Any = {
      "exponentials": tokens * plan.chunk, "stages": plan.stages,
      "matmul_flops": 2 * tokens * plan.width * (plan.chunk + 2 * size),
  }
  sums: dict[int | None, Array] = {}  # Of reads of shallow sources, by their gates.
  before: list[Array] = []
  for stream, score, gate in zip(streams[1:], scores[1:], plan.gates[1:], strict=True):
    others = sums.get(gate)
    sums[gate], before_BGHNP = _call(
        read_kernel, plan, (batch, plan.heads * plan.parts),
        [(stream, specs.stream(stream)), (score, specs.scores), count,
         (others, if_given(others, specs.values))],
        [(wide, specs.values), (state, before_spec)], **work,
    )
    before.append(before_BGHNP)
  gated = tuple(sums.get(number) for number in range(len(gates)))
  opened = wide if save and epilogue.z is not None else None
  read = wide if save and plan.gates[0] is not None else None
  moments = _float32(batch, plan.heads, plan.parts, 2, time) if plan.moments else None
  work["matmul_flops"] += _gate_flops(plan, gates)
  out_BTE, open_BTE, moments_BHA2T, read_BTE, before_BGHNP, final_BHPN = _call(
      forward_kernel, plan, (batch, plan.heads * plan.parts),
      [
          (streams[0], specs.stream(streams[0])), (scores[0], specs.scores),
          (sums.get(None), if_given(sums.get(None), specs.values)),
          (_rounded(plan, gates), tuple(map(specs.gate, gates))),
          (gated, tuple(if_given(x_BTE, specs.values) for x_BTE in gated)),
          (epilogue, specs.epilogue(epilogue)), count,
      ],
      [
          (jax.ShapeDtypeStruct(wide.shape, plan.out), specs.values),
          (opened, if_given(opened, specs.values)), (moments, if_given(moments, specs.moments)),
          (read, if_given(read, specs.values)), (state, before_spec),
          (_float32(batch, plan.heads, plan.channels, size), specs.state),
      ],
      **work,
  )
  reads = tuple(
      read_BTE if plan.gates[0] == number else x_BTE for number, x_BTE in enumerate(gated)
  )
  return Forward(
      out_BTE, moments_BHA2T, final_BHPN, open_BTE, reads if save else (),
      (before_BGHNP, *before) if save else (),
  )


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
  specs = Specs(plan, by_part=True)
  d_out_BTE, d_moments_BH2T, d_final_BHPN = gradients
  d_y_BTE = d_z_BTE = None
  if z_BTE is not None:
    d_z_BTE = jax.ShapeDtypeStruct(z_BTE.shape, z_BTE.dtype)
  if z_BTE is not None or d_moments_BH2T is not None:
    d_y_BTE = jax.ShapeDtypeStruct(d_out_BTE.shape, plan.dtype)
  opened = None if d_y_BTE is None else open_BTE
  tokens = plan.batch * plan.time * plan.heads * plan.parts
  factors = tuple(gate.hidden_R if isinstance(gate, LowRankGate) else gate for gate in gates)
  d_factors = tuple(jax.ShapeDtypeStruct(d_out_BTE.shape, factor.dtype) for factor in factors)
  wide, count = (specs.values,) * len(gates), (count_BT, if_given(count_BT, specs.count))
  work: Any = {
      "exponentials": tokens, "stages": plan.stages,
      "matmul_flops": 2 * tokens * plan.state_size * plan.width,
  }

  def source(stream: Stream) -> tuple[PyTree, PyTree]:
    """Returns the source without what the kernels do not read, and its specs."""
    none: Any = {"k_BTK": None, "v_BTE": None, "scale_BHT": None, "initial_BHPN": None}
    return (
        dataclasses.replace(stream, **none), dataclasses.replace(specs.stream(stream), **none)
    )

  def states(stream: Stream) -> list[tuple[PyTree, PyTree]]:
    """Returns the shapes of the gradients of a source's states, and their specs."""
    initial = _like(stream.initial_BHPN)
    return [(_between(plan), specs.between), (initial, if_given(initial, specs.state))]

  found_BTE, found_z_BTE, d_reads, d_gates, d_after, d_initial = _call(
      states_backward_kernel, plan, (plan.batch, plan.heads * plan.parts),
      [
          source(streams[0]), (_rounded(plan, gates), tuple(map(specs.gate, gates))),
          (reads, wide), (z_BTE, if_given(z_BTE, specs.values)), count,
          (opened, if_given(opened, specs.values)), (d_out_BTE, specs.values),
          (d_moments_BH2T, if_given(d_moments_BH2T, specs.d_moments)),
          (d_final_BHPN, specs.state),
      ],
      [
          (d_y_BTE, if_given(d_y_BTE, specs.values)), (d_z_BTE, if_given(d_z_BTE, specs.values)),
          (_like(reads), wide), (d_factors, wide), *states(streams[0]),
      ],
      **work | {"matmul_flops": work["matmul_flops"] + _gate_flops(plan, gates)},
  )
  y_BTE = d_out_BTE if found_BTE is None else found_BTE
  after, initial = [d_after], [d_initial]
  for stream, gate in zip(streams[1:], plan.gates[1:], strict=True):
    d_after, d_initial = _call(
        read_backward_kernel, plan, (plan.batch, plan.heads * plan.parts),
        [source(stream), count, (y_BTE if gate is None else d_reads[gate], specs.values)],
        states(stream), **work,
    )
    after.append(d_after)
    initial.append(d_initial)
  return StatesBackward(y_BTE, found_z_BTE, d_reads, d_gates, tuple(after), tuple(initial))


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
  specs = Specs(plan, by_part=False)
  batch, time, size = plan.batch, plan.time, plan.state_size
  parts = (plan.heads, plan.parts)
  skips = epilogue is not None and epilogue.skip is not None
  x_BTE = None if epilogue is None else epilogue.x
  sums, last = _float32(batch, *parts, time), _float32(batch, plan.chunks, *parts)
  shares = _float32(batch, *parts, 1 + len(plan.pieces), time)
  whole = _float32(batch, plan.chunks, *parts, len(plan.pieces))
  stream = dataclasses.replace(stream, initial_BHPN=None)
  epilogue_spec = None if epilogue is None else specs.epilogue(epilogue)

  def written(stream: Stream) -> Stream:
    """Drops what the kernel gives no gradient of."""
    return dataclasses.replace(stream, scale_BHT=None, high_BHT=None, low_BHT=None)

  by_part = 2 * batch * time * plan.heads * plan.parts
  by_group = 2 * batch * time * plan.groups
  return _call(
      chunks_backward_kernel, plan, (batch, plan.chunks, plan.groups),
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
              TokenSums(specs.shares, specs.sums, if_given(stream.scale_BHT, specs.sums)),
          ),
          (
              PartSums(last, whole, last if skips else None),
              PartSums(specs.numbers, specs.whole, specs.numbers if skips else None),
          ),
      ],
      matmul_flops=by_part * plan.width * (2 * plan.chunk + 3 * size)
      + by_group * 3 * plan.chunk * size,
      exponentials=by_part // 2 * plan.chunk, stages=BACK_STAGES,
  )
