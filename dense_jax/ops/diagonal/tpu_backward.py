"""The backward selective kernel for TPUs; letters and references as in `tpu_kernels.py`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.diagonal.kernel_inputs import LowRank, Source, Wide
from dense_jax.ops.diagonal.tpu_kernels import (
    GROUP,
    Ref,
    column,
    gate_before,
    load,
    load_tokens,
    multiply,
    row,
    rows_of,
    skip_input,
    stack,
)
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matmul import kernel_dot
from dense_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scratch:
  """Scratch memory of the backward kernel, float32.

  Attributes:
    states: a chunk's states of one source after the one before it, [tokens + 1, N, E].
    own: the sum of a chunk's reads without a gate, [tokens, E]; None if nothing needs it.
    gated: for each gate the sum of its reads before the gate, [gates, tokens, E]; None without.
    products: the inputs that are products, [products, tokens, E], in whose place their gradients
      are written; None without. The fields that follow are of the chunks done so far.
    carry: the gradient of each source's state before them, [S, tiles, N, E].
    da: the gradient of A, [S, tiles, N, E].
    dvectors: those of the biases and of `skip`, [S + 1, tiles, 1, E].
    dmaps: those of B and C in this chunk, from the tiles done so far, [2 S, tokens, N].
    dhidden: likewise that of each product's first factor, [tokens, R].
    dup: that of each product's second factor, [tiles, R, E].
  """

  states: Any
  own: Any
  gated: Any
  products: Any
  carry: Any
  da: Any
  dvectors: Any
  dmaps: Any
  dhidden: tuple[Any, ...]
  dup: tuple[Any, ...]

  def reads(self, source: Source) -> Ref:
    """Returns where reads of a source are added; None if nothing needs them."""
    return self.own if source.gate is None else self.gated.at[source.gate]


def backward_kernel(
    sources: tuple[Source, ...],
    gates: tuple[Wide, ...],
    epilogue: Epilogue,
    masks: Ref,
    before: tuple[Ref, ...],
    dy: Ref,
    dfinal: Ref,
    gradients: tuple[Any, ...],
    dgates: tuple[Any, ...],
    depilogue: Any,
    scratch: Scratch,
) -> None:
  """Computes the gradients of one chunk and tile; chunks are visited in reverse.

  Args:
    sources: the recurrences.
    gates: the gates of their reads.
    epilogue: what follows.
    masks: as in `forward_kernel`.
    before: each source's state before the chunk.
    dy: the gradient of the result.
    dfinal: the gradient of the first source's last state.
    gradients: the sources' gradients, each a `Source`, outputs; those of A, the bias and a
      product's second factor are of one row.
    dgates: the gates' gradients, outputs; likewise.
    depilogue: the epilogue's gradients, an `Epilogue`, outputs; that of `skip` is of one row.
    scratch: see `Scratch`.
  """
  chunk, tile = pl.program_id(1), pl.program_id(2)
  is_last_tile = tile == pl.num_programs(2) - 1
  is_last_chunk = chunk == pl.num_programs(1) - 1

  @pl.when(chunk == 0)
  def _start() -> None:
    for index in range(len(sources) + 1):
      scratch.dvectors[index, tile] = jnp.zeros((1, dy.shape[1]), jnp.float32)
    for index in range(len(sources)):
      first = dfinal[...] if index == 0 else jnp.zeros(dfinal.shape, jnp.float32)
      scratch.carry[index, tile] = first
      scratch.da[index, tile] = jnp.zeros(dfinal.shape, jnp.float32)
    for ref in scratch.dup:
      ref[tile] = jnp.zeros(ref.shape[1:], jnp.float32)

  @pl.when(tile == 0)
  def _start_sums_over_tiles() -> None:
    for ref in (scratch.dmaps, *scratch.dhidden):
      ref[...] = jnp.zeros(ref.shape, jnp.float32)

  wides = [*(source.dt for source in sources), *gates]
  arrays = multiply(wides, scratch.products)
  seen = set()
  for index, (source, gradient) in enumerate(zip(sources, gradients, strict=True)):
    adjoint = _Adjoint(
        source, arrays[index], None if source.gate is None else gates[source.gate],
        None if source.gate is None else arrays[len(sources) + source.gate], epilogue, masks,
        epilogue.skip if index == 0 and epilogue.x is None else None, dy, gradient,
        arrays[index] if isinstance(source.dt, LowRank) else gradient.dt, scratch,
        scratch.dmaps.at[2 * index], scratch.dmaps.at[2 * index + 1],
    )
    scratch.states[0] = before[index][...]
    adjoint.make_states(first=source.gate not in seen)
    seen.add(source.gate)
    carry_NE, da_NE, dbias_1E = adjoint.run((
        scratch.carry[index, tile], scratch.da[index, tile], scratch.dvectors[index, tile]
    ))
    scratch.carry[index, tile], scratch.da[index, tile] = carry_NE, da_NE
    scratch.dvectors[index, tile] = dbias_1E
    gradient.initial_BNE[...], gradient.a_NE[...] = carry_NE, da_NE
    if gradient.bias_E is not None:
      gradient.bias_E[...] = dbias_1E

  dproducts = [
      array if isinstance(gate, LowRank) else dgate
      for gate, array, dgate in zip(gates, arrays[len(sources) :], dgates, strict=True)
  ]
  if epilogue.skip is not None or epilogue.z is not None or gates:
    scratch.dvectors[len(sources), tile] = _end(
        gates, arrays[len(sources) :], dproducts, epilogue, depilogue,
        skip_input(epilogue, sources), scratch, dy, scratch.dvectors[len(sources), tile],
    )
  if depilogue.skip is not None:
    depilogue.skip[...] = scratch.dvectors[len(sources), tile]

  outputs = [*(gradient.dt for gradient in gradients), *dgates]
  count = 0
  for wide, product, output in zip(wides, arrays, outputs, strict=True):
    if isinstance(wide, LowRank):
      _factors(wide, product, scratch.dhidden[count], scratch.dup[count].at[tile])
      _when_complete(output.up_RE, scratch.dup[count].at[tile], is_last_chunk)
      _when_complete(output.hidden_BTR, scratch.dhidden[count], is_last_tile)
      count += 1
  for index, gradient in enumerate(gradients):
    _when_complete(gradient.b_BTN, scratch.dmaps.at[2 * index], is_last_tile)
    _when_complete(gradient.c_BTN, scratch.dmaps.at[2 * index + 1], is_last_tile)


def _factors(wide: LowRank, product: Ref, dhidden: Ref, dup: Ref) -> None:
  """Adds the gradients of a product's factors, given its own."""
  d_CE = product[...].astype(wide.hidden_BTR.dtype)
  dhidden[...] += kernel_dot(d_CE, wide.up_RE[...], (1, 1))
  dup[...] += kernel_dot(wide.hidden_BTR[...], d_CE, (0, 0))


def _when_complete(output: Ref, total: Ref, complete: Array) -> None:
  """Writes a sum once it is complete."""

  @pl.when(complete)
  def _write() -> None:
    output[...] = total[...].astype(output.dtype)


@dataclasses.dataclass(frozen=True)
class _Adjoint:
  """One source in one chunk and tile of the backward kernel.

  Attributes:
    source: the recurrence.
    steps: the reference to an array of what makes step sizes.
    gate: the read's gate; None means 1.
    gate_array: the reference to an array of it, or of what it is silu of.
    epilogue: what follows the sum of reads.
    masks: as in `forward_kernel`.
    skip: the factor of the source's x in the epilogue; None means 0.
    dy: the gradient of the result.
    gradient: the source's gradient, an output.
    dsteps: where the gradient of `steps` is written, which may be `steps`.
    scratch: see `Scratch`.
    db: where gradients of B are added, [tokens, N].
    dc: likewise of C.
  """

  source: Source
  steps: Ref
  gate: Any
  gate_array: Ref
  epilogue: Epilogue
  masks: Ref
  skip: Ref
  dy: Ref
  gradient: Any
  dsteps: Ref
  scratch: Scratch
  db: Ref
  dc: Ref

  def make_states(self, *, first: bool) -> None:
    """Fills the scratch states, of which the first is given, and adds to the reads.

    Args:
      first: whether no reads have been written where this source's go.
    """
    source, states, reads = self.source, self.scratch.states, self.scratch.reads(self.source)
    a_NE = source.a_NE[...]

    def group(number: Array, h_NE: Array) -> Array:
      rows = rows_of(number)
      tokens = load_tokens(source, self.steps, self.masks, rows)
      read = []
      for token in range(GROUP):
        h_NE = tokens.step(a_NE, h_NE, token)
        states[number * GROUP + token + 1] = h_NE
        if reads is not None:
          read.append(tokens.read(h_NE, token))
      if reads is not None:
        y_CE = stack(read)
        reads[rows, :] = y_CE if first else reads[rows, :] + y_CE
      return h_NE

    jax.lax.fori_loop(0, source.x_BTE.shape[0] // GROUP, group, states[0])

  def run(self, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Runs the chunk in reverse, and writes the gradients of its tokens.

    Args:
      carried: the gradients of the state after the chunk, of A and of the bias so far.

    Returns:
      `carried`, with the gradient of the state before the chunk and the chunk's parts of the
      others.
    """
    source, states = self.source, self.scratch.states
    groups = source.x_BTE.shape[0] // GROUP
    a_NE = source.a_NE[...]

    def group(number: Array, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
      carry_NE, da_NE, dbias_1E = carried
      number = groups - 1 - number
      rows = rows_of(number)
      tokens = load_tokens(source, self.steps, self.masks, rows)
      dsum_CE = _before_epilogue(self.epilogue, self.dy, rows)
      dread_CE = dsum_CE
      if self.gate is not None:
        dread_CE = dsum_CE * gate_before(self.gate, self.gate_array, rows)[0]
      du, ddecay, db, dc = [], [], [], []
      h_NE = states[number * GROUP + GROUP]
      for token in reversed(range(GROUP)):
        b_N1, c_N1 = column(tokens.b_NC, token), column(tokens.c_NC, token)
        dread_1E = row(dread_CE, token)
        dc.append(jnp.sum(h_NE * dread_1E, axis=1, keepdims=True))
        dh_NE = carry_NE + c_N1 * dread_1E
        db.append(jnp.sum(dh_NE * row(tokens.u_CE, token), axis=1, keepdims=True))
        du.append(jnp.sum(dh_NE * b_N1, axis=0, keepdims=True))
        carry_NE = dh_NE * tokens.decay(a_NE, token)
        h_NE = states[number * GROUP + token]
        dlog_NE = carry_NE * h_NE  # The gradient with respect to dt A, the log decay.
        ddecay.append(jnp.sum(dlog_NE * a_NE, axis=0, keepdims=True))
        da_NE += dlog_NE * row(tokens.dt_CE, token)

      du_CE = stack(du[::-1])
      ddt_CE = du_CE * tokens.x_CE + stack(ddecay[::-1])
      if tokens.slope_CE is not None:
        ddt_CE *= tokens.slope_CE
        dbias_1E += jnp.sum(ddt_CE, axis=0, keepdims=True)
      dx_CE = du_CE * tokens.dt_CE
      if self.skip is not None:
        dx_CE += self.skip[...] * dsum_CE
      self.dsteps[rows, :] = ddt_CE.astype(self.dsteps.dtype)
      self.gradient.x_BTE[rows, :] = dx_CE.astype(self.gradient.x_BTE.dtype)
      self.db[rows, :] += jnp.concatenate(db[::-1], axis=1).T
      self.dc[rows, :] += jnp.concatenate(dc[::-1], axis=1).T
      return carry_NE, da_NE, dbias_1E

    return jax.lax.fori_loop(0, groups, group, carried)


def _before_epilogue(epilogue: Epilogue, dy: Ref, rows: Any) -> Array:
  """Returns the gradient of the sum of gated reads."""
  dy_CE = load(dy, rows)
  return dy_CE if epilogue.z is None else dy_CE * jax.nn.silu(load(epilogue.z, rows))


def _slope(x: Array) -> Array:
  """Returns the derivative of silu."""
  half = jax.nn.sigmoid(x)
  return half * (1 + x * (1 - half))


def _end(
    gates: tuple[Wide, ...], arrays: list[Ref], dgates: list[Ref], epilogue: Epilogue,
    depilogue: Any, x: Ref, scratch: Scratch, dy: Ref, dskip_1E: Array,
) -> Array:
  """Writes the gradients of a chunk's gates and epilogue.

  Args:
    gates: the gates.
    arrays: the reference to an array of each, or of what it is silu of.
    dgates: where those arrays' gradients are written, which may be the arrays.
    epilogue: what follows.
    depilogue: its gradients, outputs.
    x: what `skip` multiplies.
    scratch: see `Scratch`.
    dy: the gradient of the result.
    dskip_1E: the gradient of `skip` so far.

  Returns:
    The gradient of `skip`, with the chunk's part.
  """

  def group(number: Array, dskip_1E: Array) -> Array:
    rows = rows_of(number)
    dsum_CE = _before_epilogue(epilogue, dy, rows)
    loaded = [gate_before(*pair, rows) for pair in zip(gates, arrays, strict=True)]
    sums = [scratch.gated[index, rows, :] for index in range(len(gates))]
    if epilogue.z is not None:
      z_CE = load(epilogue.z, rows)
      y_CE = jnp.zeros_like(z_CE) if scratch.own is None else scratch.own[rows, :]
      for (gate_CE, _), sum_CE in zip(loaded, sums, strict=True):
        y_CE += gate_CE * sum_CE
      if epilogue.skip is not None:
        y_CE += epilogue.skip[...] * load(x, rows)
      dz_CE = load(dy, rows) * y_CE * _slope(z_CE)
      depilogue.z[rows, :] = dz_CE.astype(depilogue.z.dtype)
    for (_, before_CE), sum_CE, ref in zip(loaded, sums, dgates, strict=True):
      dgate_CE = dsum_CE * sum_CE
      if before_CE is not None:
        dgate_CE *= _slope(before_CE)
      ref[rows, :] = dgate_CE.astype(ref.dtype)
    if epilogue.skip is not None:
      dskip_1E += jnp.sum(dsum_CE * load(x, rows), axis=0, keepdims=True)
    if epilogue.skip is not None and depilogue.x is not None:
      dx_CE = epilogue.skip[...] * dsum_CE
      depilogue.x[rows, :] = dx_CE.astype(depilogue.x.dtype)
    return dskip_1E

  return jax.lax.fori_loop(0, dy.shape[0] // GROUP, group, dskip_1E)
