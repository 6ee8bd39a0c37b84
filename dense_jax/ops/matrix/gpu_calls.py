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
from dense_jax.ops.matrix.gpu_scan import forward_kernel, scores_kernel, states_backward_kernel
from dense_jax.ops.matrix.gpu_tiles import Plan, Stream, power_of_two
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array, PyTree

# Warps of every program.
_WARPS = 8

Gate = Array | LowRankGate
"""A gate of reads: [B, T, E], or low-rank with [B, T, R] and [R, E]."""


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
    self.time = time
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
    self.scores = spec((None, None, time, plan.tile), lambda b, t, g, h, p, x: (b, g, 0, 0))
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
    self.shares = spec(
        (None, *numbers, plan.tiles + len(plan.pieces), time), lambda b, t, g, h, p, x: (b, h, p, 0, 0)
    )
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

  def gate(self, gate: Gate) -> PyTree:
    """Returns the specs of a gate of a program that takes a part of a head."""
    if not isinstance(gate, LowRankGate):
      return self.values
    rank, width = gate.up_RE.shape[0], self.values.block_shape[-1]
    return dataclasses.replace(
        gate, hidden_R=pl.BlockSpec((None, self.time, rank), lambda b, i: (b, 0, 0)),
        up_RE=pl.BlockSpec((rank, width), lambda b, i: (0, i)),
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
  specs, sources = _Specs(plan, by_part=True), len(streams)
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
          (epilogue, specs.epilogue(epilogue)), (count_BT, _if(count_BT, specs.count)),
      ],
      [
          (jax.ShapeDtypeStruct(wide, plan.out), specs.values),
          (open_BTE, _if(open_BTE, specs.values)),
          (moments_BHA2T, _if(moments_BHA2T, specs.moments)),
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
  factors = tuple(gate.hidden_R if isinstance(gate, LowRankGate) else gate for gate in gates)
  d_gates = tuple(jax.ShapeDtypeStruct(d_out_BTE.shape, factor.dtype) for factor in factors)
  wide = (specs.values,) * len(gates)

  def asked(stream: Stream) -> Stream:
    """Drops what the kernel does not read."""
    return dataclasses.replace(
        stream, k_BTK=None, v_BTE=None, scale_BHT=None, initial_BHPN=None
    )

  found_BTE, d_z_BTE, d_reads, d_gates, d_after, d_initial = _call(
      states_backward_kernel, plan, (plan.batch, plan.heads * plan.parts),
      [
          (
              tuple(asked(stream) for stream in streams),
              tuple(asked(specs.stream(stream)) for stream in streams),
          ),
          (_rounded(plan, gates), tuple(map(specs.gate, gates))), (reads, wide),
          (z_BTE, _if(z_BTE, specs.values)),
          (count_BT, _if(count_BT, specs.count)), (opened, _if(opened, specs.values)),
          (d_out_BTE, specs.values), (d_moments_BH2T, _if(d_moments_BH2T, specs.d_moments)),
          (d_final_BHPN, specs.state),
      ],
      [
          (d_y_BTE, _if(d_y_BTE, specs.values)), (d_z_BTE, _if(d_z_BTE, specs.values)),
          (_like(reads), wide), (d_gates, wide),
          ((_between(plan),) * sources, (specs.between,) * sources),
          (initial, tuple(_if(shape, specs.state) for shape in initial)),
      ],
      matmul_flops=2 * tokens * plan.state_size * plan.width + _gate_flops(plan, gates),
      exponentials=tokens, stages=plan.stages,
  )
  d_y_BTE = d_out_BTE if found_BTE is None else found_BTE
  return StatesBackward(d_y_BTE, d_z_BTE, d_reads, d_gates, d_after, d_initial)


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
  specs = _Specs(plan, by_part=False)
  batch, time, size = plan.batch, plan.time, plan.state_size
  tiles, parts = plan.chunks * plan.tiles, (plan.heads, plan.parts)
  skips = epilogue is not None and epilogue.skip is not None
  x_BTE = None if epilogue is None else epilogue.x
  sums, last = _float32(batch, *parts, time), _float32(batch, tiles, *parts)
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
          (count_BT, _if(count_BT, specs.count)), (d_read_BTE, specs.values),
          (d_y_BTE, _if(d_y_BTE, specs.values)),
          (states[0], specs.between), (states[1], specs.between),
      ],
      [
          (_like(written(stream)), written(specs.stream(stream))),
          (_like(x_BTE), _if(x_BTE, specs.values)),
          (
              TokenSums(shares, sums, _if(stream.scale_BHT, sums)),
              TokenSums(specs.shares, specs.sums, _if(stream.scale_BHT, specs.sums)),
          ),
          (
              PartSums(last, _float32(batch, plan.chunks, *parts), last if skips else None),
              PartSums(specs.numbers, specs.whole, specs.numbers if skips else None),
          ),
      ],
      matmul_flops=by_part * plan.width * 3 * (seen + size) + by_group * 4 * seen * size,
      exponentials=by_part // 2 * 3 * seen, stages=1,
  )
