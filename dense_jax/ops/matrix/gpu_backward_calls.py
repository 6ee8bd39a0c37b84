"""The calls of the GPU kernels of matrix states' gradients: operands, results and costs."""

import dataclasses
from typing import Any

import jax

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.gpu_backward import chunks_backward_kernel
from dense_jax.ops.matrix.gpu_calls import between, call_kernel, float32, gate_flops, like, rounded
from dense_jax.ops.matrix.gpu_plan import Plan, Stream, power_of_two
from dense_jax.ops.matrix.gpu_program import PartSums, TokenSums
from dense_jax.ops.matrix.gpu_scan import (
  read_backward_kernel,
  states_backward_kernel,
  states_kernel,
)
from dense_jax.ops.matrix.gpu_specs import Gate, Specs, if_given
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StatesBackward:
  """The gradients of what lies between the reads and the result, and of the own states.

  Attributes:
    y_BTE: of the sum of reads.
    z_BTE: of the epilogue's gate; None without a gate.
    reads: for each gate, of the reads that it multiplies.
    gates: of each gate, [B, T, E]; that of a low-rank gate is of its value before the activation.
    after: of the states after each chunk.
    initial: of the state before the first token; None where it was zero.
  """

  y_BTE: Array
  z_BTE: Array | None
  reads: tuple[Array, ...]
  gates: tuple[Array, ...]
  after: Array
  initial: Array | None


def call_states_backward(
    plan: Plan,
    stream: Stream,
    gates: tuple[Gate, ...],
    z_BTE: Array | None,
    count_BT: Array | None,
    open_BTE: Array,
    reads: tuple[Array, ...],
    gradients: tuple[Array, Array | None, Array],
) -> StatesBackward:
  """Computes gradients of what lies between the reads and the result, and of the own states.

  Args:
    plan: the sizes.
    stream: the layer's own recurrence.
    gates: gates of reads.
    z_BTE: the epilogue's gate; None means no gate.
    count_BT: resets up to each token, inclusive; None means none.
    open_BTE: the epilogue's result before its gate.
    reads: for each gate the sum of the reads that it multiplies.
    gradients: of the result, of its moments, [B, H, 2, T], and of the last state.
  """
  specs = Specs(plan, by_part=True)
  d_out_BTE, d_moments_BH2T, d_final_BHPN = gradients
  d_y_BTE = d_z_BTE = None
  if z_BTE is not None:
    d_z_BTE = jax.ShapeDtypeStruct(z_BTE.shape, z_BTE.dtype)
  if z_BTE is not None or d_moments_BH2T is not None:
    d_y_BTE = jax.ShapeDtypeStruct(d_out_BTE.shape, plan.dtype)
  opened = None if d_y_BTE is None else open_BTE
  factors = tuple(gate.hidden_R if isinstance(gate, LowRankGate) else gate for gate in gates)
  d_factors = tuple(jax.ShapeDtypeStruct(d_out_BTE.shape, factor.dtype) for factor in factors)
  whole, count = (specs.values,) * len(gates), (count_BT, if_given(count_BT, specs.count))
  cost = _states_cost(plan, 1)
  cost["matmul_flops"] += gate_flops(plan, gates)
  found_BTE, found_z_BTE, d_reads, d_gates, d_after, d_initial = call_kernel(
      states_backward_kernel, plan, (plan.batch, plan.heads * plan.parts),
      [
          _queried(specs, stream), (rounded(plan, gates), tuple(map(specs.gate, gates))),
          (reads, whole), (z_BTE, if_given(z_BTE, specs.values)), count,
          (opened, if_given(opened, specs.values)), (d_out_BTE, specs.values),
          (d_moments_BH2T, if_given(d_moments_BH2T, specs.d_moments)),
          (d_final_BHPN, specs.state),
      ],
      [
          (d_y_BTE, if_given(d_y_BTE, specs.values)), (d_z_BTE, if_given(d_z_BTE, specs.values)),
          (like(reads), whole), (d_factors, whole), *_states(plan, specs, stream),
      ],
      **cost,
  )
  y_BTE = d_out_BTE if found_BTE is None else found_BTE
  return StatesBackward(y_BTE, found_z_BTE, d_reads, d_gates, d_after, d_initial)


def call_read_backward(
    plan: Plan, stream: Stream, count_BT: Array | None, d_read_BTE: Array
) -> tuple[Array, Array | None]:
  """Computes the gradients of a shallow source's states after each chunk, and of the first one.

  Args:
    plan: the sizes.
    stream: the source.
    count_BT: resets up to each token, inclusive; None means none.
    d_read_BTE: the gradient of its read.
  """
  specs = Specs(plan, by_part=True)
  return call_kernel(
      read_backward_kernel, plan, (plan.batch, plan.heads * plan.parts),
      [
          _queried(specs, stream), (count_BT, if_given(count_BT, specs.count)),
          (d_read_BTE, specs.values),
      ],
      _states(plan, specs, stream), **_states_cost(plan, 1),
  )


def call_states(plan: Plan, streams: tuple[Stream, ...], count_BT: Array | None) -> Array:
  """Computes the states before each chunk of a source and of those that join it.

  The backward pass does so just before it needs them: kept from the forward pass, those of all
  layers of a super-block and of all their sources would be in memory at once.
  """
  specs = Specs(plan, by_part=True)

  def unread(streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
    return dataclasses.replace(streams[0], q_BTK=None), *streams[1:]

  (before_BGHNP,) = call_kernel(
      states_kernel, plan, (plan.batch, plan.heads * plan.parts),
      [
          (unread(streams), unread(specs.recurrence(streams))),
          (count_BT, if_given(count_BT, specs.count)),
      ],
      [(between(plan), specs.between)], **_states_cost(plan, len(streams)),
  )
  return before_BGHNP


def _queried(specs: Specs, stream: Stream) -> tuple[PyTree, PyTree]:
  """Returns a source without what the states' gradients do not need, and its specs."""
  none: Any = {"k_BTK": None, "v_BTE": None, "scale_BHT": None, "initial_BHPN": None}
  return dataclasses.replace(stream, **none), dataclasses.replace(specs.stream(stream), **none)


def _states(plan: Plan, specs: Specs, stream: Stream) -> list[tuple[PyTree, PyTree]]:
  """Returns the shapes of the gradients of a source's states, and their specs."""
  initial = like(stream.initial_BHPN)
  return [(between(plan), specs.between), (initial, if_given(initial, specs.state))]


def _states_cost(plan: Plan, products: int) -> dict[str, int]:
  """Returns the work of a pass of states, or of their gradients, through the chunks.

  Args:
    plan: the sizes.
    products: matmuls [N, C] by P for each chunk and head, one for each source.
  """
  tokens = plan.batch * plan.time * plan.heads * plan.parts
  return {
      "matmul_flops": 2 * tokens * products * plan.state_size * plan.width,
      "exponentials": tokens,
      "stages": plan.stages(products),
  }


def call_chunks_backward(
    plan: Plan,
    stream: Stream,
    epilogue: Epilogue | None,
    count_BT: Array | None,
    d_read_BTE: Array,
    d_y_BTE: Array | None,
    states: tuple[Array | None, Array],
) -> tuple[Stream, Array | None, TokenSums, PartSums]:
  """Computes one source's gradients.

  Args:
    plan: the sizes.
    stream: the source.
    epilogue: skip and what it multiplies, if the source is the layer's own.
    count_BT: resets up to each token, inclusive; None means none.
    d_read_BTE: the gradient of the source's read.
    d_y_BTE: the gradient of the sum of reads, if skip needs another than `d_read_BTE`.
    states: the states before each chunk, and the gradients of those after each; of a source that
      joins, None and the gradients of its leader's.

  Returns:
    The outputs of `chunks_backward_kernel`.
  """
  plan = dataclasses.replace(plan, width=power_of_two(plan.channels, 64))
  specs = Specs(plan, by_part=False)
  batch, time, size = plan.batch, plan.time, plan.state_size
  parts = (plan.heads, plan.parts)
  skips = epilogue is not None and epilogue.skip is not None
  x_BTE = None if epilogue is None else epilogue.x
  sums, last = float32(batch, *parts, time), float32(batch, plan.chunks, *parts)
  before_BGHNP, d_after_BGHNP = states
  terms = 1 if before_BGHNP is None else 1 + len(plan.pieces)
  shares = float32(batch, *parts, terms, time)
  whole = None
  if before_BGHNP is not None:
    whole = float32(batch, plan.chunks, *parts, len(plan.pieces))
  stream = dataclasses.replace(stream, initial_BHPN=None)
  epilogue_spec = None if epilogue is None else specs.epilogue(epilogue)

  def written(stream: Stream) -> Stream:
    """Drops what the kernel gives no gradient of."""
    return dataclasses.replace(stream, scale_BHT=None, high_BHT=None, low_BHT=None)

  by_part = 2 * batch * time * plan.heads * plan.parts
  by_group = 2 * batch * time * plan.groups
  return call_kernel(
      chunks_backward_kernel, plan, (batch, plan.chunks, plan.groups),
      [
          (stream, specs.stream(stream)), (epilogue, epilogue_spec),
          (count_BT, if_given(count_BT, specs.count)), (d_read_BTE, specs.values),
          (d_y_BTE, if_given(d_y_BTE, specs.values)),
          (before_BGHNP, if_given(before_BGHNP, specs.between)),
          (d_after_BGHNP, specs.between),
      ],
      [
          (like(written(stream)), written(specs.stream(stream))),
          (like(x_BTE), if_given(x_BTE, specs.values)),
          (
              TokenSums(shares, sums, if_given(stream.scale_BHT, sums)),
              TokenSums(specs.shares(terms), specs.sums, if_given(stream.scale_BHT, specs.sums)),
          ),
          (
              PartSums(last, whole, last if skips else None),
              PartSums(
                  specs.numbers, if_given(whole, specs.whole), specs.numbers if skips else None
              ),
          ),
      ],
      matmul_flops=by_part * plan.width * (2 * plan.chunk + (2 if whole is None else 3) * size)
      + by_group * 3 * plan.chunk * size,
      exponentials=by_part // 2 * plan.chunk,
      stages=plan.stages(),
  )
