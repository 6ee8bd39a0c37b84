"""The calls of the GPU kernels that run matrix states forward: operands, results and costs."""

import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.gpu_calls import call_kernel, float32, gate_flops, rounded, wide
from dense_jax.ops.matrix.gpu_plan import Plan, Stream, recurrence
from dense_jax.ops.matrix.gpu_scan import forward_kernel, read_kernel, scores_kernel
from dense_jax.ops.matrix.gpu_specs import Gate, Specs, if_given
from dense_jax.types import Array


def _call_scores(plan: Plan, streams: tuple[Stream, ...]) -> tuple[Array, ...]:
  """Computes each source's products of queries and keys of one chunk, [B, J, T, S]."""
  tokens = pl.BlockSpec((None, plan.chunk, plan.state_size), lambda b, t, g: (b, t, g))
  products = pl.BlockSpec((None, None, plan.chunk, plan.chunk), lambda b, t, g: (b, g, t, 0))
  shape, sources = float32(plan.batch, plan.groups, plan.time, plan.chunk), len(streams)
  return call_kernel(
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
  """

  out_BTE: Array
  moments_BHA2T: Array | None
  final_BHPN: Array
  open_BTE: Array | None
  reads: tuple[Array, ...]


def _call_reads(
    plan: Plan, streams: tuple[Stream, ...], scores: tuple[Array, ...], count_BT: Array | None
) -> dict[int | None, Array]:
  """Computes the reads of shallow sources, one recurrence after the other.

  Each pass has one state in registers, like the pass of the layer's own: three states at a time
  leave so few registers that parts of heads have to be half as wide, and take longer than three
  passes (in a step of mamba2 with m = 2, on an H200, 301 ms in place of 196).

  Args:
    plan: the sizes.
    streams: all sources; the first is the layer's own, which is left out.
    scores: their products of queries and keys.
    count_BT: resets up to each token, inclusive; None means none.

  Returns:
    The sums of the reads by gate.
  """
  specs = Specs(plan, by_part=True)
  sums: dict[int | None, Array] = {}
  for leader, (stream, gate) in enumerate(zip(streams, plan.gates, strict=True)):
    if leader == 0 or stream.joins:
      continue
    others, together = sums.get(gate), recurrence(streams, leader)
    count = len(together)
    (sums[gate],) = call_kernel(
        read_kernel, plan, (plan.batch, plan.heads * plan.parts),
        [
            (together, specs.recurrence(together)),
            (scores[leader : leader + count], (specs.scores,) * count),
            (count_BT, if_given(count_BT, specs.count)), (others, if_given(others, specs.values)),
        ],
        [(wide(plan), specs.values)], **_scan_cost(plan, count),
    )
  return sums


def _scan_cost(plan: Plan, sources: int) -> dict[str, int]:
  """Returns the work of one recurrence's pass through the chunks, for `call_kernel`."""
  tokens = plan.batch * plan.time * plan.heads * plan.parts
  sizes = sources * (plan.chunk + plan.state_size) + plan.state_size
  return {
      "matmul_flops": 2 * tokens * plan.width * sizes,
      "exponentials": tokens * plan.chunk, "stages": plan.stages(sources),
  }


def call_forward(
    plan: Plan, streams: tuple[Stream, ...], gates: tuple[Gate, ...], epilogue: Epilogue,
    count_BT: Array | None, *, save: bool,
) -> Forward:
  """Computes the forward pass; `save` asks for what the backward pass needs of it."""
  specs = Specs(plan, by_part=True)
  batch, time, size = plan.batch, plan.time, plan.state_size
  scores = _call_scores(plan, streams)
  sums = _call_reads(plan, streams, scores, count_BT)
  gated = tuple(sums.get(number) for number in range(len(gates)))
  ungated, whole = sums.get(None), wide(plan)
  opened = whole if save and epilogue.z is not None else None
  read = whole if save and plan.gates[0] is not None else None
  moments = float32(batch, plan.heads, plan.parts, 2, time) if plan.moments else None
  cost = _scan_cost(plan, 1)
  cost["matmul_flops"] += gate_flops(plan, gates)
  out_BTE, open_BTE, moments_BHA2T, read_BTE, final_BHPN = call_kernel(
      forward_kernel, plan, (batch, plan.heads * plan.parts),
      [
          (streams[0], specs.stream(streams[0])), (scores[0], specs.scores),
          (ungated, if_given(ungated, specs.values)),
          (rounded(plan, gates), tuple(map(specs.gate, gates))),
          (gated, tuple(if_given(x_BTE, specs.values) for x_BTE in gated)),
          (epilogue, specs.epilogue(epilogue)), (count_BT, if_given(count_BT, specs.count)),
      ],
      [
          (jax.ShapeDtypeStruct(whole.shape, plan.out), specs.values),
          (opened, if_given(opened, specs.values)), (moments, if_given(moments, specs.moments)),
          (read, if_given(read, specs.values)),
          (float32(batch, plan.heads, plan.channels, size), specs.state),
      ],
      **cost,
  )
  reads: Any = tuple(
      read_BTE if plan.gates[0] == number else x_BTE for number, x_BTE in enumerate(gated)
  )
  return Forward(out_BTE, moments_BHA2T, final_BHPN, open_BTE, reads if save else ())
