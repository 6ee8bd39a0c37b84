"""The backward selective kernel for GPUs; letters as in `gpu_kernels.py`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dense_jax.ops.diagonal.gpu_kernels import (
    Finish,
    Gate,
    Masks,
    Ref,
    Rows,
    States,
    Token,
    group_numbers,
    load_token,
    loop,
    multiply,
    row,
    whole,
)
from dense_jax.ops.diagonal.kernel_inputs import Source, Wide
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.triton_functions import silu, silu_slope
from dense_jax.types import Array

# Tokens of a group, whose states and decays stay in registers.
GROUP_BACK = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scratch:
  """Memory of one program of the backward kernel, which no other one sees, for one chunk.

  Attributes:
    states: the state before each group of the chunk, [C / GROUP_BACK, N, E].
    steps: the product that makes one source's step sizes, [C, E]; None if there is none.
    gates: the gates' products, [C, E]; None for arrays.
    own: the sum of reads without a gate, [C, E] in float32; None if nothing needs it.
    gated: for each gate the sum of its reads before the gate, as `own`.
  """

  states: Any
  steps: Any
  gates: tuple[Any, ...]
  own: Any
  gated: tuple[Any, ...]

  def reads(self, source: Source) -> Any:
    """Returns where reads of a source are added."""
    return self.own if source.gate is None else self.gated[source.gate]


class _Carry(NamedTuple):
  """Sums over the tokens done so far, of one source."""

  dh_NE: Array
  da_NE: Array
  dbias_E: Any


def backward_kernel(
    sources: tuple[Source, ...],
    gates: tuple[Wide, ...],
    epilogue: Epilogue,
    masks: Masks,
    channels: Ref,
    before: tuple[Ref, ...],
    dy: Ref,
    dfinal: Ref,
    dsources: tuple[Any, ...],
    dgates: tuple[Ref, ...],
    depilogue: Any,
    scratch: Scratch,
    *,
    chunk: int,
    barrier: Callable[[], None],
) -> None:
  """Computes the gradients; chunks are visited in reverse, and sources one after the other.

  Args:
    sources: the recurrences.
    gates: the gates of their reads.
    epilogue: what follows the sum of their reads.
    masks: resets and padding.
    channels: see `States`.
    before: each source's state before each chunk.
    dy: the gradient of the result.
    dfinal: the gradient of the first source's last state.
    dsources: the sources' gradients, each a `Source`, outputs; those of A and the bias are of one
      row, those of B and C of one block of channels, and that of a product is not yet that of its
      factors.
    dgates: the gates' gradients, outputs; likewise.
    depilogue: the epilogue's gradients, an `Epilogue`, outputs; that of `skip` is of one row.
    scratch: see `Scratch`.
    chunk: C.
    barrier: makes what the program's threads wrote visible to each other.
  """
  count = dy.shape[0] // chunk
  skip_E = whole(epilogue.skip)
  states = States(channels, dfinal.shape[0])
  zeros = jnp.zeros(dfinal.shape, jnp.float32)
  zeros_E = jnp.zeros(dfinal.shape[1:], jnp.float32)

  def run_chunk(
      index: Array, carried: tuple[list[_Carry], Array | None]
  ) -> tuple[list[_Carry], Array | None]:
    carries, dskip_E = carried
    index = count - 1 - index
    first = index * chunk
    for wide, product in zip(gates, scratch.gates, strict=True):
      multiply(wide, product, first)
    factors = [
        Gate.of(wide, product, first) for wide, product in zip(gates, scratch.gates, strict=True)
    ]
    after, seen = [], set()
    for number, source in enumerate(sources):
      multiply(source.dt, scratch.steps, first)
      if scratch.steps is not None or (number == 0 and jax.tree.leaves(scratch.gates)):
        barrier()
      adjoint = _Adjoint(
          source, Rows.of(source.dt, scratch.steps, first),
          None if source.gate is None else factors[source.gate],
          dsources[number], epilogue, masks, states, scratch, dy,
          skip_E if number == 0 and epilogue.x is None else None,
          source.gate not in seen, whole(source.bias_E), states.load(source.a_NE),
      )
      seen.add(source.gate)
      loop(
          chunk // GROUP_BACK, functools.partial(adjoint.forward_group, first),
          states.load(before[number], index),
      )
      barrier()
      after.append(loop(
          chunk // GROUP_BACK, functools.partial(adjoint.backward_group, first, chunk),
          carries[number],
      ))
      barrier()
    if epilogue.skip is not None or epilogue.z is not None or gates:
      ends = _Ends(
          epilogue, depilogue, sources[0].x_BTE, factors, dgates, scratch, dy, skip_E
      )
      dskip_E = loop(
          chunk // GROUP_BACK, functools.partial(ends.backward_group, first), dskip_E
      )
      barrier()
    return after, dskip_E

  start = [
      _Carry(
          zeros if number else states.load(dfinal), zeros,
          None if source.bias_E is None else zeros_E,
      )
      for number, source in enumerate(sources)
  ]
  carries, dskip_E = loop(count, run_chunk, (start, None if skip_E is None else zeros_E))
  for carry, gradient in zip(carries, dsources, strict=True):
    states.store(gradient.initial_BNE, carry.dh_NE)
    states.store(gradient.a_NE, carry.da_NE)
    if gradient.bias_E is not None:
      gradient.bias_E[...] = carry.dbias_E
  if depilogue.skip is not None:
    depilogue.skip[...] = dskip_E


@dataclasses.dataclass(frozen=True)
class _Adjoint:
  """One source in one chunk of the backward kernel; fields that have an argument's name are it.

  Attributes:
    steps: what the step sizes are made of.
    gate: the read's gate; None means 1.
    gradient: the source's gradient.
    skip_E: the factor of the source's x in the epilogue; None means 0.
    is_first: whether no other source's reads have been written where this one's go.
  """

  source: Source
  steps: Rows
  gate: Gate | None
  gradient: Any
  epilogue: Epilogue
  masks: Masks
  states: States
  scratch: Scratch
  dy: Ref
  skip_E: Array | None
  is_first: bool
  bias_E: Array | None
  a_NE: Array

  def _tokens(self, numbers: Sequence[Array]) -> list[Token]:
    return [
        load_token(self.source, self.steps, self.masks, self.bias_E, number) for number in numbers
    ]

  def forward_group(self, first: Array, group: Array, h_NE: Array) -> Array:
    """Writes the state before a group, and adds reads to the chunk's; returns the state after."""
    self.states.store(self.scratch.states, h_NE, group)
    numbers = group_numbers(first + group * GROUP_BACK, GROUP_BACK)
    tokens, reads = self._tokens(numbers), self.scratch.reads(self.source)
    c = [row(self.source.c_BTN, number) for number in numbers]
    sums = []
    for token, c_N in zip(tokens, c, strict=True):
      h_NE = token.step(token.decay(self.a_NE), h_NE)
      if reads is not None:
        sums.append(jnp.sum(h_NE * c_N[:, None], axis=0))
    for number, y_E in zip(numbers if sums else (), sums, strict=True):
      place = number - first
      reads[place, :] = y_E if self.is_first else reads[place, :] + y_E
    return h_NE

  def backward_group(
      self, first: Array, chunk: int, group: Array, carry: _Carry
  ) -> _Carry:
    """Runs a group of tokens in reverse, and writes their gradients."""
    group = chunk // GROUP_BACK - 1 - group
    numbers = group_numbers(first + group * GROUP_BACK, GROUP_BACK)
    tokens = self._tokens(numbers)
    gates = [None if self.gate is None else self.gate.load(number) for number in numbers]
    cotangents = [before_epilogue(self.epilogue, self.dy, number) for number in numbers]
    states = [self.states.load(self.scratch.states, group)]
    for token in tokens:
      states.append(token.step(token.decay(self.a_NE), states[-1]))

    dh_NE, da_NE, dbias_E = carry
    results = []
    for index in reversed(range(GROUP_BACK)):
      number, token, dy_E, gate_E = numbers[index], tokens[index], cotangents[index], gates[index]
      b_N, c_N = row(self.source.b_BTN, number), row(self.source.c_BTN, number)
      dread_E = dy_E if gate_E is None else gate_E * dy_E
      dc_N = jnp.sum(states[index + 1] * dread_E[None], axis=1)
      dh_NE += c_N[:, None] * dread_E[None]
      db_N = jnp.sum(dh_NE * (token.dt_E * token.x_E)[None], axis=1)
      # At once: each thread has a sum over channels whole, in N registers.
      for ref, sum_N in ((self.gradient.b_BTN, db_N), (self.gradient.c_BTN, dc_N)):
        ref[number, :] = sum_N.astype(ref.dtype)
      du_E = jnp.sum(dh_NE * b_N[:, None], axis=0)
      dh_NE *= token.decay(self.a_NE)
      dlog_NE = dh_NE * states[index]  # The gradient with respect to dt A, the log decay.
      ddt_E = du_E * token.x_E + jnp.sum(dlog_NE * self.a_NE, axis=0)
      da_NE += dlog_NE * token.dt_E[None]
      if token.slope_E is not None:
        ddt_E *= token.slope_E
        dbias_E += ddt_E
      dx_E = du_E * token.dt_E
      if self.skip_E is not None:
        dx_E += self.skip_E * dy_E
      results.append((number, ddt_E, dx_E))

    for number, ddt_E, dx_E in results:
      for ref, value in ((self.gradient.dt, ddt_E), (self.gradient.x_BTE, dx_E)):
        ref[number, :] = value.astype(ref.dtype)
    return _Carry(dh_NE, da_NE, dbias_E)


def before_epilogue(epilogue: Epilogue, dy: Ref, number: Array) -> Array:
  """Returns the gradient of the sum of gated reads at a token."""
  dy_E = row(dy, number)
  return dy_E if epilogue.z is None else dy_E * silu(row(epilogue.z, number))


@dataclasses.dataclass(frozen=True)
class _Ends:
  """The gates and the epilogue in one chunk of the backward kernel; the fields are as there.

  Attributes:
    own_x: the first source's x.
  """

  epilogue: Epilogue
  depilogue: Any
  own_x: Ref
  gates: Sequence[Gate]
  dgates: Sequence[Ref]
  scratch: Scratch
  dy: Ref
  skip_E: Array | None

  def backward_group(self, first: Array, group: Array, dskip_E: Any) -> Any:
    """Writes a group's gradients, and adds to that of `skip`."""
    numbers = group_numbers(first + group * GROUP_BACK, GROUP_BACK)
    loaded = [
        (
            number, Finish.of(self.epilogue, self.skip_E, self.own_x, number),
            row(self.dy, number), self._sums(number - first),
            [gate.rows.load(number) for gate in self.gates],
        )
        for number in numbers
    ]
    for number, end, dy_E, (own_E, sums), before in loaded:
      dsum_E = dy_E
      silu_E = end.gate()
      if silu_E is not None:
        reads = [] if own_E is None else [own_E]
        for gate, gate_E, sum_E in zip(self.gates, before, sums, strict=True):
          reads.append((silu(gate_E) if gate.is_product else gate_E) * sum_E)
        dz_E = dy_E * end.skipped(functools.reduce(jnp.add, reads)) * end.slope()
        self._store(self.depilogue.z, number, dz_E)
        dsum_E = dy_E * silu_E
      for gate, gate_E, sum_E, dgate in zip(self.gates, before, sums, self.dgates, strict=True):
        dgate_E = dsum_E * sum_E
        self._store(dgate, number, dgate_E * silu_slope(gate_E) if gate.is_product else dgate_E)
      if self.skip_E is not None and end.x_E is not None:
        dskip_E += dsum_E * end.x_E
      if self.depilogue.x is not None:
        assert self.skip_E is not None
        self._store(self.depilogue.x, number, self.skip_E * dsum_E)
    return dskip_E

  def _sums(self, place: Array) -> tuple[Array | None, list[Array]]:
    own, gated = self.scratch.own, self.scratch.gated
    return None if own is None else own[place, :], [ref[place, :] for ref in gated]

  def _store(self, ref: Ref, number: Array, value_E: Array) -> None:
    ref[number, :] = value_E.astype(ref.dtype)
