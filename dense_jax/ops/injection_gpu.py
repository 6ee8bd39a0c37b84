"""Input injection on a GPU: one pass over memory, and one for its gradients.

XLA writes the gates, and what the norm and its gradient need, to memory several times. Here a
program has a few tokens with all their channels. It multiplies out their low-rank gates, and keeps
what it has read between the norm's sums and their use, so that each array is read once from memory
and each result written once.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dense_jax.ops import partition
from dense_jax.ops.chunks import round_up
from dense_jax.ops.injection import Injected, Norm, inject
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.ops.matmul import kernel_dot
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.ops.triton_functions import silu, silu_slope
from dense_jax.types import WIDTH_AXIS, Array, PyTree

# Tokens of a program, and the least size of a matmul's axis in Triton.
_TILE = 16
# Channels that are computed at a time, and the most such blocks of a token.
_BLOCK, _MOST_BLOCKS = 256, 32


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Choices that the kernels are compiled for.

  Attributes:
    gates: for each source, the index of its gate among the gates; None means 1.
    epsilon: the norm's.
    interpret: true to run the kernels as ordinary JAX.
  """

  gates: tuple[int | None, ...]
  epsilon: float
  interpret: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
  """Arrays, or references to blocks of them or to those of their gradients.

  Attributes:
    own: [..., E].
    shallow: S arrays like `own`.
    hidden: of each gate, [..., R].
    up: of each gate, [R, E].
    scale: the norm's, [E]; None means no norm.
  """

  own: PyTree
  shallow: PyTree
  hidden: PyTree
  up: PyTree
  scale: PyTree


def gpu_inject(
    own_E: Array, shallow: Sequence[Array], gates: Sequence[LowRankGate | None],
    norm: Norm | None, *, interpret: bool = False,
) -> Injected:
  """Computes `inject`, by kernels for whole sequences with all channels on one device.

  Args:
    own_E: see `inject`.
    shallow: see `inject`.
    gates: see `inject`.
    norm: see `inject`.
    interpret: true to run the kernels as ordinary JAX, on any platform.
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = not mesh.empty and mesh.size > 1 and mesh.shape[WIDTH_AXIS] > 1
  block = _block(own_E.shape[-1])
  covered = block >= _TILE and own_E.shape[-1] <= _MOST_BLOCKS * block
  if own_E.ndim != 3 or split or not (covered or interpret):
    return inject(own_E, shallow, gates, norm)
  distinct = list({id(gate): gate for gate in gates if gate is not None}.values())
  index = {id(gate): number for number, gate in enumerate(distinct)}
  numbers = tuple(None if gate is None else index[id(gate)] for gate in gates)
  plan = _Plan(numbers, 0.0 if norm is None else norm.epsilon, interpret)
  inputs = _Inputs(
      own_E, tuple(shallow), tuple(gate.hidden_R for gate in distinct),
      tuple(gate.up_RE for gate in distinct), None if norm is None else norm.scale[...],
  )
  rows, whole = partition.by_row(None, None), partition.split()
  specs = _Inputs(
      rows, (rows,) * len(shallow), (rows,) * len(distinct), (whole,) * len(distinct),
      partition.unless_none(inputs.scale, whole),
  )
  return partition.over_mesh(
      functools.partial(_inject, plan), lambda width: (specs,), Injected(rows, rows, rows), inputs
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _inject(plan: _Plan, inputs: _Inputs) -> Injected:
  shape = inputs.own.shape
  fused = _run(plan, _by_token(inputs))[: shape[0] * shape[1]].reshape(shape)
  return Injected(fused, inputs.own, inputs.own)


def _forward(plan: _Plan, inputs: _Inputs) -> tuple[Injected, _Inputs]:
  inputs = jax.tree.map(lambda leaf: leaf.value, inputs)  # Leaves also say what has gradients.
  return _inject(plan, inputs), inputs


def _backward(plan: _Plan, inputs: _Inputs, d_out: Injected) -> tuple[_Inputs]:
  batch, time, _ = inputs.own.shape
  arrays = _by_token(inputs)
  # The gradient of what nobody reads is not an array.
  d_fused, *d_own = (
      None if isinstance(d, SymbolicZero) else _tokens(d) for d in d_out
  )
  gradient, d_gates = _run_gradient(
      plan, arrays, jnp.zeros_like(arrays.own) if d_fused is None else d_fused,
      [d for d in d_own if d is not None],
  )

  def rows(x: Array, like: Array) -> Array:
    return x[: batch * time, : like.shape[-1]].reshape(like.shape)

  d_up = [
      jax.lax.dot_general(
          hidden, d_gate, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
      )[: len(up)].astype(up.dtype)
      for hidden, d_gate, up in zip(arrays.hidden, d_gates, inputs.up, strict=True)
  ]
  return (_Inputs(
      rows(gradient.own, inputs.own),
      tuple(rows(x, inputs.own) for x in gradient.shallow),
      tuple(map(rows, gradient.hidden, inputs.hidden)), tuple(d_up),
      None if inputs.scale is None else jnp.sum(gradient.scale, axis=0),
  ),)


_inject.defvjp(_forward, _backward, symbolic_zeros=True)


def _tokens(x: Array) -> Array:
  """Returns [B, T, ...] as [tokens, ...], padded with zeros to whole tiles."""
  x = x.reshape(-1, x.shape[-1])
  extra = -len(x) % _TILE
  return jnp.pad(x, ((0, extra), (0, 0))) if extra else x


def _by_token(inputs: _Inputs) -> _Inputs:
  """Returns arrays as the kernels take them: ranks are powers of two."""

  def padded(x: Array, axis: int) -> Array:
    rank = x.shape[axis]
    extra = max(_TILE, 1 << (rank - 1).bit_length()) - rank
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, extra)
    return jnp.pad(x, widths) if extra else x

  dtype = inputs.own.dtype
  return _Inputs(
      _tokens(inputs.own), tuple(map(_tokens, inputs.shallow)),
      tuple(padded(_tokens(hidden), 1) for hidden in inputs.hidden),
      tuple(padded(up.astype(dtype), 0) for up in inputs.up), inputs.scale,
  )


def _block(width: int) -> int:
  """Returns the channels of a block: the largest power of two that divides the width, or less."""
  return min(_BLOCK, width & -width)


def _blocks(width: int) -> list[PyTree]:
  """Returns the channels of each block, as indices of a tile."""
  block = _block(width)
  return [(slice(None), pl.ds(first, block)) for first in range(0, width, block)]


def _specs(inputs: _Inputs) -> _Inputs:
  """Returns the block specs of arrays."""

  def rows(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec((_TILE, x.shape[1]), lambda i: (i, 0))

  return _Inputs(
      rows(inputs.own), tuple(map(rows, inputs.shallow)), tuple(map(rows, inputs.hidden)),
      tuple(pl.BlockSpec(up.shape, lambda i: (0, 0)) for up in inputs.up),
      partition.unless_none(inputs.scale, pl.BlockSpec(inputs.own.shape[1:], lambda i: (0,))),
  )


def _options(plan: _Plan, inputs: _Inputs, cost: KernelCost) -> dict[str, PyTree]:
  tokens, width = inputs.own.shape
  # 64 numbers of an array for each thread, so that several stay in registers.
  warps = min(16, max(4, round_up(width, 128) // 128))
  return {
      "grid": (tokens // _TILE,), "interpret": plan.interpret, "cost_estimate": cost.estimate(),
      "compiler_params": triton.CompilerParams(
          num_warps=1 << (warps.bit_length() - 1), num_stages=1
      ),
  }


def _cost(inputs: _Inputs, *, products: int, arrays: int, hidden: int) -> KernelCost:
  """Returns a kernel's cost.

  Args:
    inputs: its inputs.
    products: matmuls of each gate.
    arrays: arrays of the size of `own` that are read or written.
    hidden: how often each gate's hidden array is read or written.
  """
  own = inputs.own
  ranks = sum(len(up) for up in inputs.up)
  return KernelCost(
      matmul_flops=2 * own.size * ranks * products,
      flops=own.size * (6 + 8 * len(inputs.shallow)) * products,
      transcendentals=own.size * len(inputs.up) * min(products, 2),
      bytes_accessed=arrays * own.nbytes + hidden * sum(x.nbytes for x in inputs.hidden),
  )


def _run(plan: _Plan, inputs: _Inputs) -> Array:
  """Computes `_inject` of tokens."""
  specs = _specs(inputs)
  cost = _cost(inputs, products=1, arrays=2 + len(inputs.shallow), hidden=1)
  with cost.scope():
    return pl.pallas_call(
        functools.partial(_kernel, plan), in_specs=[specs], out_specs=specs.own,
        out_shape=jax.ShapeDtypeStruct(inputs.own.shape, inputs.own.dtype),
        **_options(plan, inputs, cost),
    )(inputs)


def _run_gradient(
    plan: _Plan, inputs: _Inputs, d_out: Array, d_own: Sequence[Array]
) -> tuple[_Inputs, tuple[Array, ...]]:
  """Returns the gradients of the inputs, and those of the gates before their activation.

  The gradient of the norm's scale is that of each tile; those of the gates' matrices are None.

  Args:
    plan: the plan.
    inputs: the inputs.
    d_out: the gradient of the fused input.
    d_own: the gradients of the own input by its other readers.
  """
  specs = _specs(inputs)
  tokens, width = inputs.own.shape

  def like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)

  scale = scale_spec = None
  if inputs.scale is not None:
    scale = jax.ShapeDtypeStruct((tokens // _TILE, width), jnp.float32)
    scale_spec = pl.BlockSpec((None, width), lambda i: (i, 0))
  gates = len(inputs.up)
  arrays = 3 + len(d_own) + 2 * len(inputs.shallow) + gates
  cost = _cost(inputs, products=3, arrays=arrays, hidden=2)
  if scale is not None:
    cost = dataclasses.replace(cost, bytes_accessed=cost.bytes_accessed + scale.size * 4)
  with cost.scope():
    return pl.pallas_call(
        functools.partial(_gradient_kernel, plan),
        in_specs=[specs, specs.own, [specs.own] * len(d_own)],
        out_specs=(
            _Inputs(specs.own, specs.shallow, specs.hidden, None, scale_spec),
            (specs.own,) * gates,
        ),
        out_shape=(
            _Inputs(
                like(inputs.own), tuple(map(like, inputs.shallow)),
                tuple(map(like, inputs.hidden)), None, scale,
            ),
            (like(inputs.own),) * gates,
        ),
        **_options(plan, inputs, cost),
    )(inputs, d_out, list(d_own))


def _before_activation(inputs: _Inputs, hidden: list[Array], at: PyTree) -> list[Array]:
  """Returns the gates of a block before their activation; float32."""
  return [kernel_dot(x, up[at], (1, 0)) for x, up in zip(hidden, inputs.up, strict=True)]


def _total(plan: _Plan, inputs: _Inputs, hidden: list[Array], at: PyTree) -> Array:
  """Returns own + sum_i gate_i shallow_i of a block; float32."""
  gates = [silu(value) for value in _before_activation(inputs, hidden, at)]
  total = inputs.own[at].astype(jnp.float32)
  for shallow, number in zip(inputs.shallow, plan.gates, strict=True):
    read = shallow[at].astype(jnp.float32)
    total += read if number is None else gates[number] * read
  return total


def _inverse(plan: _Plan, squares: Array, width: int) -> Array:
  """Returns what the norm multiplies each token by, given squares of its channels, [T, 1]."""
  return jax.lax.rsqrt(jnp.sum(squares, axis=1) / width + plan.epsilon)[:, None]


def _kernel(plan: _Plan, inputs: _Inputs, out: PyTree) -> None:
  """Computes `_inject` of a tile; the arguments are references to its blocks."""
  width = inputs.own.shape[1]
  hidden = [x[...] for x in inputs.hidden]
  totals, squares = [], jnp.zeros((_TILE, _block(width)), jnp.float32)
  for at in _blocks(width):
    total = _total(plan, inputs, hidden, at)
    if inputs.scale is None:
      out[at] = total.astype(out.dtype)
    else:
      squares += total * total
      totals.append(total.astype(out.dtype))
  if inputs.scale is None:
    return
  inverse = _inverse(plan, squares, width)
  for at, total in zip(_blocks(width), totals, strict=True):
    scaled = total.astype(jnp.float32) * inverse * inputs.scale[at[1]][None]
    out[at] = scaled.astype(out.dtype)


def _gradient_kernel(
    plan: _Plan, inputs: _Inputs, d_out: PyTree, d_own: Sequence[PyTree], gradient: _Inputs,
    d_gates: Sequence[PyTree],
) -> None:
  """Computes the gradients of a tile; the arguments are references to its blocks."""
  width = inputs.own.shape[1]
  hidden = [x[...] for x in inputs.hidden]
  totals = []
  squares = products = jnp.zeros((_TILE, _block(width)), jnp.float32)
  if inputs.scale is not None:
    for at in _blocks(width):
      total = _total(plan, inputs, hidden, at)
      squares += total * total
      products += total * d_out[at].astype(jnp.float32) * inputs.scale[at[1]][None]
      totals.append(total.astype(d_out.dtype))
    inverse = _inverse(plan, squares, width)
    pull = inverse * inverse * inverse * (jnp.sum(products, axis=1) / width)[:, None]

  d_hidden = [jnp.zeros(x.shape, jnp.float32) for x in hidden]
  for index, at in enumerate(_blocks(width)):
    d_total = d_out[at].astype(jnp.float32)
    if inputs.scale is not None:
      total = totals[index].astype(jnp.float32)
      gradient.scale[at[1]] = jnp.sum(d_total * total * inverse, axis=0)
      d_total = d_total * inputs.scale[at[1]][None] * inverse - total * pull
    total_own = sum((x[at].astype(jnp.float32) for x in d_own), d_total)
    gradient.own[at] = total_own.astype(gradient.own.dtype)
    before = _before_activation(inputs, hidden, at)
    gates, slopes = [silu(value) for value in before], [silu_slope(value) for value in before]
    reads = [jnp.zeros(d_total.shape, jnp.float32) for _ in before]
    for shallow, d_shallow, number in zip(
        inputs.shallow, gradient.shallow, plan.gates, strict=True
    ):
      d_read = d_total
      if number is not None:
        d_read = d_total * gates[number]
        reads[number] += shallow[at].astype(jnp.float32)
      d_shallow[at] = d_read.astype(d_shallow.dtype)
    for number, read in enumerate(reads):
      d_gate = (d_total * read * slopes[number]).astype(d_gates[number].dtype)
      d_gates[number][at] = d_gate
      d_hidden[number] += kernel_dot(d_gate, inputs.up[number][at], (1, 1))
  for total, d_x in zip(d_hidden, gradient.hidden, strict=True):
    d_x[...] = total.astype(d_x.dtype)
