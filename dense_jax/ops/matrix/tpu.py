"""A layer's matrix states and those of its shallow sources, read and finished in one TPU kernel.

    h_t = a_t h_{t-1} + s_t v_t k_t^T        y_t = sum over sources of gate_t * (h_t q_t)
    result_t = (y_t + skip x_t) * silu(z_t)

The arithmetic is that of `dense_jax.ops.matrix.chunked` (chunkwise form, arXiv 2307.08621,
section 2.3; heads that share keys, arXiv 2405.21060, section 7.2). The difference is the memory:
chunks are steps of a grid, states stay in VMEM from one chunk to the next, and neither scores
nor reads are written to HBM, but only the result, in its own dtype. Only under differentiation are
the states between chunks saved, once per source, in the dtype in which matmuls take them.

The rows of a state h_PN are independent of each other, so each program of the grid takes a block
of rows: several heads of one group, or a part of one head. Programs on the same chunk of a group
share its scores and sum the gradients of its keys and queries in VMEM (`Blocks`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dense_jax.ops.chunks import round_up, split_time
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.ops.matrix import tpu_arrays
from dense_jax.ops.matrix.kernel_inputs import Source, check_inputs
from dense_jax.ops.matrix.tpu_backward import Sums, backward_kernel
from dense_jax.ops.matrix.tpu_chunk import LANES, SUBLANES, Blocks, Finish, LowRank, Stream
from dense_jax.ops.matrix.tpu_forward import forward_kernel
from dense_jax.ops.matrix.tpu_plan import (
    CHUNK_MULTIPLE,
    DEFAULT_CHUNK,
    Plan,
    Specs,
    choose_blocks,
    compute_dtype,
    states,
)
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array, PyTree


def matrix_finish(
    sources: Sequence[Source],
    gates: Sequence[Array | LowRankGate],
    resets_BT: Array | None,
    epilogue: Epilogue,
    *,
    chunk: int = 0,
    interpret: bool = False,
) -> tuple[Output, Array]:
  """Computes the epilogue of the sum of all sources' gated reads, and the first's last state.

  Differentiable in every float input; each gradient has its input's dtype.

  Args:
    sources: recurrences of equal shapes: the layer's own, then its shallow sources.
    gates: gates of reads, [B, T, E] or low-rank; several sources may share one.
    resets_BT: bool, true where every state is cleared before the token; None means never.
    epilogue: what follows the reads, with arrays [B, T, E] and a skip of each head. With a skip,
      an x of None means the first source's values, without their scale.
    chunk: tokens per chunk, rounded up to a multiple of 16; 0 means DEFAULT_CHUNK.
    interpret: true to run the kernels as ordinary JAX, on any platform.

  Returns:
    The result, y_BTE and its moments_BTH2, and final_BHPN, float32.
  """
  first = sources[0]
  batch, time, groups, state_size = first.k_BTJN.shape
  heads, width = first.log_decay_BTH.shape[2], first.v_BTE.shape[2]
  channels = width // heads
  check_inputs(sources, gates, resets_BT, epilogue)

  # The heads of a group together must fill whole tiles of lanes: the larger the power of two that
  # divides their number, the less each is padded. With several groups, each group's keys must too.
  together = heads // groups & -(heads // groups)
  lanes = LANES // min(together, LANES // SUBLANES)
  chunk = min(round_up(chunk or DEFAULT_CHUNK, CHUNK_MULTIPLE), round_up(time, CHUNK_MULTIPLE))
  plan = Plan(
      batch=batch, tokens=time, chunks=-(-time // chunk), chunk=chunk, heads=heads, groups=groups,
      channels=round_up(channels, lanes),
      state_size=round_up(state_size, LANES if groups > 1 else SUBLANES),
      dtype=jnp.dtype(epilogue.dtype), moments=epilogue.moments, interpret=interpret,
  )
  count_BG1C = None
  if resets_BT is not None:
    # float32 is exact for these counts, and the kernel can transpose it.
    count_BG1C = jnp.cumsum(split_time(resets_BT, chunk), axis=2, dtype=jnp.float32)[:, :, None]
  streams = tuple(
      tpu_arrays.stream(
          plan, source, None if source.gate is None or source.joins else gates[source.gate]
      )
      for source in sources
  )
  finish = tpu_arrays.finish(plan, epilogue)
  y_BTE, moments_BHG2C, final_BEN = _reads(plan, streams, finish, count_BG1C)
  if channels < plan.channels or y_BTE.shape[1] > time:
    y_BTHP = y_BTE.reshape(batch, -1, heads, plan.channels)[:, :time, :, :channels]
    y_BTE = y_BTHP.reshape(batch, time, width)
  moments_BTH2 = None
  if moments_BHG2C is not None:
    moments_BTH2 = jnp.transpose(moments_BHG2C, (0, 2, 4, 1, 3)).reshape(batch, -1, heads, 2)
    moments_BTH2 = moments_BTH2[:, :time]
  final_BHPN = final_BEN.reshape(batch, heads, plan.channels, plan.state_size)
  return Output(y_BTE, moments_BTH2), final_BHPN[:, :, :channels, :state_size]


def _call(
    kernel: Callable[..., None],
    plan: Plan,
    blocks: Blocks,
    inputs: PyTree,
    in_specs: PyTree,
    outputs: PyTree,
    out_specs: PyTree,
    scratch: PyTree,
    *,
    sources: int,
    matmuls: tuple[int, int, int],
    by_gates: int,
    in_place: Callable[[PyTree, PyTree], Sequence[tuple[Any, Any]]] = lambda _, __: (),
) -> PyTree:
  """Runs a kernel over rows of the batch and sets and, in order, chunks and blocks of a set.

  Args:
    kernel: takes `blocks`, then references to inputs, outputs and scratch.
    plan: the sizes.
    blocks: the division of states into blocks.
    inputs: the kernel's arguments.
    in_specs: their block specs.
    outputs: the results' shapes.
    out_specs: their block specs.
    scratch: the kernel's own memory.
    sources: the number of sources.
    matmuls: matmuls per chunk, for the cost estimate: for each source [C, C] by N for each set and
      [C, C] by P for each head; and for all sources [C, N] by P for each head.
    by_gates: matmuls [C, R] by E for each low-rank gate and chunk.
    in_place: chooses pairs of an input and the output that takes its memory, given trees like
      `inputs` and `outputs`. An output's block must be that of the input, and visited once.
  """
  by_keys, by_channels, by_states = matmuls
  each = plan.batch * plan.chunks * plan.chunk
  tokens = sources * each
  sets = blocks.count // blocks.per_set
  weights = tokens * plan.chunk * blocks.count * blocks.heads
  streams: tuple[Stream, ...] = inputs[0]
  ranks = sum(len(s.gate.up_RE) for s in streams if isinstance(s.gate, LowRank))
  cost = KernelCost(
      matmul_flops=2 * tokens * plan.chunk * (
          by_keys * sets * plan.state_size + by_channels * plan.rows
      ) + 2 * each * plan.rows * (by_states * plan.state_size + by_gates * ranks),
      # Exponents, masks and products of weights; and a few operations for each value.
      flops=by_channels * (4 * weights + 8 * tokens * plan.rows),
      transcendentals=weights,
      bytes_accessed=sum(
          x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs))
      ),
  )
  numbers_in, numbers_out = _numbers(inputs), _numbers(outputs)
  with cost.scope():
    return pl.pallas_call(
        functools.partial(kernel, blocks),
        grid=(plan.batch, sets, plan.chunks, blocks.per_set),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=outputs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=cost.estimate(),
        input_output_aliases=dict(in_place(numbers_in, numbers_out)),
        interpret=plan.interpret,
    )(*inputs)


def _numbers(tree: PyTree) -> PyTree:
  """Returns the tree with each leaf's number among the leaves in its place."""
  leaves, structure = jax.tree.flatten(tree)
  return jax.tree.unflatten(structure, range(len(leaves)))


def _forward(
    plan: Plan, streams: tuple[Stream, ...], finish: Finish, count_BG1C: Array | None, *,
    save: bool,
) -> tuple[Array, Array | None, Array, list[Array | None]]:
  """Computes y_BTE, moments_BHG2C, the first source's final_BEN and, if `save`, states between."""
  streams = tuple(map(tpu_arrays.rounded_gate, streams))
  blocks = choose_blocks(plan, streams, finish, save=save, backward=False)
  specs = Specs(plan, blocks, reverse=False)
  state, sources = (plan.rows, plan.state_size), len(streams)
  shape = jax.ShapeDtypeStruct
  y_BTE = shape((plan.batch, plan.chunks * plan.chunk, plan.rows), plan.dtype)
  moments = None
  if plan.moments:
    moments = shape(
        (blocks.head_shares, plan.batch, plan.heads, plan.chunks, 2, plan.chunk), jnp.float32
    )
  before_BGEN = shape((plan.batch, plan.chunks, *state), compute_dtype(streams[0]))
  saved = [save and not stream.joins for stream in streams]
  set_rows = blocks.per_set * blocks.rows
  y_BTE, moments, final_BEN, before = _call(
      forward_kernel, plan, blocks,
      (streams, finish, count_BG1C),
      (
          tuple(map(specs.stream, streams)), specs.finish(finish),
          None if count_BG1C is None else specs.count,
      ),
      (y_BTE, moments, shape((plan.batch, *state), jnp.float32),
       [before_BGEN if kept else None for kept in saved]),
      (specs.values, specs.head_shares(2) if plan.moments else None, specs.whole,
       [specs.between if kept else None for kept in saved]),
      [
          [
              None if stream.joins else pltpu.VMEM((set_rows, plan.state_size), jnp.float32)
              for stream in streams
          ],
          [pltpu.VMEM((plan.chunk, plan.chunk), jnp.float32)] * sources,
      ],
      sources=sources, matmuls=(1, 1, sources + states(streams)), by_gates=1,
  )
  return y_BTE, None if moments is None else jnp.sum(moments, axis=0), final_BEN, before


def _backward(
    plan: Plan,
    streams: tuple[Stream, ...],
    finish: Finish,
    count_BG1C: Array | None,
    dy_BTE: Array,
    d_moments_BHG2C: Array | None,
    d_final_BEN: Array | None,
    before: list[Array | None],
) -> tuple[tuple[Stream, ...], Finish]:
  """Computes the gradients of all sources and of the epilogue's arrays."""
  exact, streams = streams, tuple(map(tpu_arrays.rounded_gate, streams))
  blocks = choose_blocks(plan, streams, finish, save=True, backward=True)
  specs = Specs(plan, blocks, reverse=True)
  in_specs, finish_specs = tuple(map(specs.stream, streams)), specs.finish(finish)

  def shares(x: Array, number: int, rows: int = 0) -> jax.ShapeDtypeStruct:
    """Returns the shape of partial sums; they are float32 if there is more than one."""
    shape = (number, plan.batch, *x.shape[1:])
    if rows:
      shape = (*shape[:-2], rows, shape[-1])
    return jax.ShapeDtypeStruct(shape, x.dtype if number == 1 else jnp.float32)

  def gradient(stream: Stream) -> Stream:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stream)
    scale = stream.scale_BHG1C
    return dataclasses.replace(
        shapes, q_BTK=shares(stream.q_BTK, blocks.key_shares),
        k_BTK=shares(stream.k_BTK, blocks.key_shares),
        scale_BHG1C=None if scale is None else shares(scale, blocks.head_shares),
        sum_BHG2C=shares(stream.sum_BHG2C, blocks.head_shares, 1),
        gate=d_gate(stream.gate),
    )

  def d_gate(gate: PyTree) -> PyTree:
    if not isinstance(gate, LowRank):
      return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), gate)
    up = jax.ShapeDtypeStruct((plan.batch, *gate.up_RE.shape), jnp.float32)
    return LowRank(shares(gate.hidden_BTR, blocks.count // blocks.per_set), up)

  def gradient_specs(stream: Stream) -> Stream:
    rows = specs.head_shares(1)
    return dataclasses.replace(
        specs.stream(stream), q_BTK=specs.d_keys, k_BTK=specs.d_keys, sum_BHG2C=rows,
        scale_BHG1C=None if stream.scale_BHG1C is None else rows, gate=specs.d_gate(stream.gate),
    )

  def sums(stream: Stream) -> Sums:
    set_rows = blocks.per_set * blocks.rows
    dh = None if stream.joins else pltpu.VMEM((set_rows, plan.state_size), jnp.float32)
    square, keys = (pltpu.VMEM((plan.chunk, n), jnp.float32) for n in (plan.chunk, plan.state_size))
    values = pltpu.VMEM((plan.chunk, blocks.rows), compute_dtype(streams[0]))
    gate = (None, None, None)
    if isinstance(stream.gate, LowRank):
      rank = len(stream.gate.up_RE)
      gate = (
          values, pltpu.VMEM((plan.chunk, rank), jnp.float32),
          pltpu.VMEM((rank, set_rows), jnp.float32),
      )
    carried = None if stream.joins else values
    return Sums(dh, square, square, keys, keys, carried, values, *gate)

  d_finish = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), finish)
  d_finish_specs = finish_specs
  if finish.skip_1E is not None:
    skip = jax.ShapeDtypeStruct((plan.batch, plan.chunks, 1, plan.rows), jnp.float32)
    d_finish = dataclasses.replace(d_finish, skip_1E=skip)
    d_finish_specs = dataclasses.replace(finish_specs, skip_1E=specs.d_channels)
  d_streams, d_finish = _call(
      functools.partial(backward_kernel, end=(plan.tokens - 1) % plan.chunk), plan, blocks,
      (streams, finish, count_BG1C, dy_BTE, d_moments_BHG2C, d_final_BEN, before),
      (
          in_specs, finish_specs, None if count_BG1C is None else specs.count, specs.values,
          None if d_moments_BHG2C is None else specs.heads(d_moments_BHG2C),
          None if d_final_BEN is None else specs.whole,
          [None if stream.joins else specs.between for stream in streams],
      ),
      (tuple(map(gradient, streams)), d_finish),
      (tuple(map(gradient_specs, streams)), d_finish_specs),
      [tuple(map(sums, streams))],
      sources=len(streams), matmuls=(3, 3, 2 * len(streams) + 3 * states(streams)), by_gates=3,
      in_place=_gradients_in_place,
  )
  if finish.skip_1E is not None:
    d_finish = dataclasses.replace(d_finish, skip_1E=jnp.sum(d_finish.skip_1E, axis=(0, 1)))
  return tuple(map(_summed, exact, d_streams)), d_finish


def _gradients_in_place(inputs: PyTree, outputs: PyTree) -> list[tuple[Any, Any]]:
  """Returns pairs of an input and its gradient, which takes its memory.

  The arrays of a layer's width: what a backward pass keeps at once of these is its peak.
  """
  (streams, finish, *_), (d_streams, d_finish) = inputs, outputs
  pairs = [(x.v_BTE, d_x.v_BTE) for x, d_x in zip(streams, d_streams, strict=True)]
  return pairs if finish.z_BTE is None else [*pairs, (finish.z_BTE, d_finish.z_BTE)]


def _summed(stream: Stream, gradient: Stream) -> Stream:
  """Sums a source's gradients over shares, and over rows that shared an array."""

  def total(x: Array, shares: Array) -> Array:
    return (shares[0] if len(shares) == 1 else jnp.sum(shares, axis=0)).astype(x.dtype)

  d_low_BHG1C = total(stream.sum_BHG2C, gradient.sum_BHG2C)
  if stream.sum_BHG2C.shape[0] < d_low_BHG1C.shape[0]:
    d_low_BHG1C = jnp.sum(d_low_BHG1C, axis=0, keepdims=True)
  scale, gate = stream.scale_BHG1C, gradient.gate
  if isinstance(gate, LowRank):
    d_up_RE = jnp.sum(gate.up_RE, axis=0).astype(stream.gate.up_RE.dtype)
    gate = LowRank(total(stream.gate.hidden_BTR, gate.hidden_BTR), d_up_RE)
  return dataclasses.replace(
      gradient, gate=gate, q_BTK=total(stream.q_BTK, gradient.q_BTK),
      k_BTK=total(stream.k_BTK, gradient.k_BTK),
      scale_BHG1C=None if scale is None else total(scale, gradient.scale_BHG1C),
      sum_BHG2C=jnp.pad(d_low_BHG1C, ((0, 0), (0, 0), (0, 0), (1, 0), (0, 0))),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reads(
    plan: Plan, streams: tuple[Stream, ...], finish: Finish, count_BG1C: Array | None
) -> tuple[Array, Array | None, Array]:
  """Computes `matrix_finish` of padded arrays."""
  return _forward(plan, streams, finish, count_BG1C, save=False)[:3]


def _reads_forward(
    plan: Plan, streams: PyTree, finish: PyTree, count_BG1C: PyTree
) -> tuple[tuple[Array, Array | None, Array], PyTree]:
  # With symbolic zeros, leaves come as pairs of a value and whether it has a gradient.
  streams, finish, count_BG1C = jax.tree.map(
      lambda leaf: leaf.value, (streams, finish, count_BG1C),
      is_leaf=lambda leaf: hasattr(leaf, "perturbed"),
  )
  y_BTE, moments_BHG2C, final_BEN, before = _forward(
      plan, streams, finish, count_BG1C, save=True
  )
  return (y_BTE, moments_BHG2C, final_BEN), (streams, finish, count_BG1C, before)


def _reads_backward(
    plan: Plan, saved: PyTree, gradients: tuple[PyTree, PyTree, PyTree]
) -> tuple[tuple[Stream, ...], Finish, None]:
  streams, finish, count_BG1C, before = saved
  dy_BTE, d_moments_BHG2C, d_final_BEN = (
      None if isinstance(x, SymbolicZero) else x for x in gradients
  )
  if dy_BTE is None:
    dy_BTE = jnp.zeros((plan.batch, plan.chunks * plan.chunk, plan.rows), plan.dtype)
  return *_backward(
      plan, streams, finish, count_BG1C, dy_BTE, d_moments_BHG2C, d_final_BEN, before
  ), None


_reads.defvjp(_reads_forward, _reads_backward, symbolic_zeros=True)
