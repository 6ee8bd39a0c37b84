"""The backward selective kernel for GPUs; letters as in `gpu_kernels.py`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from dense_jax.ops.diagonal.gpu_kernels import (
    Finish,
    Masks,
    Ref,
    States,
    Token,
    gated,
    group_numbers,
    load_gate,
    load_token,
    loop,
    row,
    whole,
)
from dense_jax.ops.diagonal.kernel_inputs import Source
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.triton_functions import silu
from dense_jax.types import Array

# Tokens of a group, whose states and decays stay in registers.
GROUP_BACK = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scratch:
  """Memory of one program of the backward kernel, which no other one sees.

  Attributes:
    states: the state before each group of a chunk, [C / GROUP_BACK, N, E].
    y: the sum of reads at a chunk's tokens, [C, E]; None if nothing needs it.
  """

  states: Array
  y: Any


class _Carry(NamedTuple):
  """Sums over the tokens done so far, of one source."""

  dh_NE: Array
  da_NE: Array
  dbias_E: Any


def backward_kernel(
    sources: tuple[Source, ...],
    epilogue: Epilogue,
    masks: Masks,
    channels: Ref,
    before: tuple[Ref, ...],
    dy: Ref,
    dfinal: Ref,
    dsources: tuple[Any, ...],
    depilogue: Any,
    scratch: Scratch,
    *,
    chunk: int,
    barrier: Callable[[], None],
) -> None:
  """Computes the gradients; chunks are visited in reverse, and sources one after the other.

  Args:
    sources: the recurrences.
    epilogue: what follows the sum of their reads.
    masks: resets and padding.
    channels: see `States`.
    before: each source's state before each chunk.
    dy: the gradient of the result.
    dfinal: the gradient of the first source's last state.
    dsources: the sources' gradients, each a `Source`, outputs; those of A and the bias are of one
      row, and those of B and C of one block of channels.
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
    after = []
    for number, source in enumerate(sources):
      adjoint = _Adjoint(
          source, dsources[number], epilogue, depilogue, masks, states, scratch, dy, skip_E,
          number, whole(source.bias_E), states.load(source.a_NE),
      )
      loop(
          chunk // GROUP_BACK, functools.partial(adjoint.forward_group, first),
          states.load(before[number], index),
      )
      barrier()
      carry = carries[number]
      after.append(loop(
          chunk // GROUP_BACK, functools.partial(adjoint.backward_group, first, chunk), carry
      ))
      barrier()
    if epilogue.skip is not None or epilogue.z is not None:
      dskip_E = loop(
          chunk // GROUP_BACK,
          functools.partial(
              _epilogue_group, first, epilogue, depilogue, sources[0].x_BTE, scratch, dy, skip_E
          ),
          dskip_E,
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
  """One source in one chunk of the backward kernel; the fields are as there."""

  source: Source
  gradient: Any
  epilogue: Epilogue
  depilogue: Any
  masks: Masks
  states: States
  scratch: Scratch
  dy: Ref
  skip_E: Array | None
  number: int
  bias_E: Array | None
  a_NE: Array

  def _tokens(self, numbers: Sequence[Array]) -> list[Token]:
    return [load_token(self.source, self.masks, self.bias_E, number) for number in numbers]

  def forward_group(self, first: Array, group: Array, h_NE: Array) -> Array:
    """Writes the state before a group, and adds reads to the chunk's; returns the state after."""
    self.states.store(self.scratch.states, h_NE, group)
    numbers = group_numbers(first + group * GROUP_BACK, GROUP_BACK)
    tokens, reads = self._tokens(numbers), self.scratch.y
    c = [row(self.source.c_BTN, number) for number in numbers]
    gates = [load_gate(self.source, number) for number in numbers]
    sums = []
    for token, c_N, gate_E in zip(tokens, c, gates, strict=True):
      h_NE = token.step(token.decay(self.a_NE), h_NE)
      if reads is not None:
        sums.append(gated(gate_E, jnp.sum(h_NE * c_N[:, None], axis=0)))
    for number, y_E in zip(numbers if sums else (), sums, strict=True):
      place = number - first
      reads[place, :] = y_E if self.number == 0 else reads[place, :] + y_E
    return h_NE

  def backward_group(
      self, first: Array, chunk: int, group: Array, carry: _Carry
  ) -> _Carry:
    """Runs a group of tokens in reverse, and writes their gradients."""
    group = chunk // GROUP_BACK - 1 - group
    numbers = group_numbers(first + group * GROUP_BACK, GROUP_BACK)
    tokens = self._tokens(numbers)
    gates = [load_gate(self.source, number) for number in numbers]
    cotangents = [self._before_epilogue(number) for number in numbers]
    states = [self.states.load(self.scratch.states, group)]
    for token in tokens:
      states.append(token.step(token.decay(self.a_NE), states[-1]))

    dh_NE, da_NE, dbias_E = carry
    results = []
    for index in reversed(range(GROUP_BACK)):
      number, token, dy_E, gate_E = numbers[index], tokens[index], cotangents[index], gates[index]
      b_N, c_N = row(self.source.b_BTN, number), row(self.source.c_BTN, number)
      dgate_E = None
      if gate_E is not None:
        dgate_E = dy_E * jnp.sum(states[index + 1] * c_N[:, None], axis=0)
      dread_E = gated(gate_E, dy_E)
      dc_N = jnp.sum(states[index + 1] * dread_E[None], axis=1)
      dh_NE += c_N[:, None] * dread_E[None]
      db_N = jnp.sum(dh_NE * (token.dt_E * token.x_E)[None], axis=1)
      # At once: each thread has a sum over channels whole, in N registers.
      self.gradient.b_BTN[number, :], self.gradient.c_BTN[number, :] = db_N, dc_N
      du_E = jnp.sum(dh_NE * b_N[:, None], axis=0)
      dh_NE *= token.decay(self.a_NE)
      dlog_NE = dh_NE * states[index]  # The gradient with respect to dt A, the log decay.
      ddt_E = du_E * token.x_E + jnp.sum(dlog_NE * self.a_NE, axis=0)
      da_NE += dlog_NE * token.dt_E[None]
      if token.slope_E is not None:
        ddt_E *= token.slope_E
        dbias_E += ddt_E
      dx_E = du_E * token.dt_E
      if self.number == 0 and self.skip_E is not None and self.epilogue.x is None:
        dx_E += self.skip_E * dy_E
      results.append((number, ddt_E, dx_E, dgate_E))

    for number, *values in results:
      for field, value in zip(("dt_BTE", "x_BTE", "gate_BTE"), values, strict=True):
        if value is not None:
          ref = getattr(self.gradient, field)
          ref[number, :] = value.astype(ref.dtype)
    return _Carry(dh_NE, da_NE, dbias_E)

  def _before_epilogue(self, number: Array) -> Array:
    """Returns the gradient of the sum of reads."""
    dy_E = row(self.dy, number)
    return dy_E if self.epilogue.z is None else dy_E * silu(row(self.epilogue.z, number))


def _epilogue_group(
    first: Array, epilogue: Epilogue, depilogue: Any, own_x: Ref, scratch: Scratch, dy: Ref,
    skip_E: Any, group: Array, dskip_E: Any,
) -> Any:
  """Writes the epilogue's gradients of a group, and adds to that of `skip`."""
  numbers = group_numbers(first + group * GROUP_BACK, GROUP_BACK)
  ends = [Finish.of(epilogue, skip_E, own_x, number) for number in numbers]
  cotangents = [row(dy, number) for number in numbers]
  reads = [None if scratch.y is None else scratch.y[number - first, :] for number in numbers]
  for number, end, dy_E, y_E in zip(numbers, ends, cotangents, reads, strict=True):
    if y_E is not None:
      dz_E = dy_E * end.skipped(y_E) * end.slope()
      depilogue.z[number, :] = dz_E.astype(depilogue.z.dtype)
    silu_E = end.gate()
    if silu_E is not None:
      dy_E *= silu_E
    if skip_E is not None and end.x_E is not None:
      dskip_E += dy_E * end.x_E
    if depilogue.x is not None:
      depilogue.x[number, :] = (skip_E * dy_E).astype(depilogue.x.dtype)
  return dskip_E


def synchronise() -> None:
  """Waits for all threads of a program; what they wrote before is then visible to all."""
  triton.debug_barrier()
