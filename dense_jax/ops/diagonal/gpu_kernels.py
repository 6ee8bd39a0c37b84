"""Selective kernels for GPUs, each for one row and one block of channels, over all tokens.

In this file T is the tokens of one row, C those of a chunk, E the channels of one block, and the
fields of `Source` and `Epilogue` are references to blocks of the arrays that they name.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from dense_jax.ops.epilogue import Epilogue
from dense_jax.types import Array

# Tokens whose loads are issued together, before the state that waits for them: a load from main
# memory takes as long as several tokens' arithmetic.
GROUP = 8
# The same in the backward kernel, which keeps a group's states and decays in registers.
GROUP_BACK = 4

Ref: TypeAlias = Any
"""A Pallas reference to a block in memory."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """One selective recurrence, with the query and gate of its read.

  Attributes:
    dt_BTE: step sizes >= 0, or with `bias_E` what softplus(dt + bias) makes step sizes of; float32
      or bfloat16.
    bias_E: float32; None means that `dt_BTE` are step sizes.
    a_NE: float32 decay rates <= 0.
    x_BTE: inputs, float32 or bfloat16.
    b_BTN: input maps, float32 or bfloat16.
    c_BTN: queries, float32 or bfloat16.
    gate_BTE: factors of the read, float32 or bfloat16; None means 1.
    initial_BNE: float32 state before the first token.
  """

  dt_BTE: Array
  bias_E: Array | None
  a_NE: Array
  x_BTE: Array
  b_BTN: Array
  c_BTN: Array
  gate_BTE: Array | None
  initial_BNE: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
  """What tokens do to all sources' states, [B, T] in float32 each; None means all 1.

  Attributes:
    keep: 1, or 0 where the state is cleared before the token.
    valid: 1, or 0 where the step size is zero (padding).
  """

  keep: Array | None
  valid: Array | None


class _Token(NamedTuple):
  """One token of one source, float32; `slope_E` is the derivative of dt by what it is made of."""

  dt_E: Array
  slope_E: Array | None
  x_E: Array
  b_N: Array
  keep: Array | None

  def decay(self, a_NE: Array) -> Array:
    """Returns decay_NE, the factor of the state before the token."""
    decay_NE = jnp.exp(self.dt_E[None] * a_NE)
    return decay_NE if self.keep is None else decay_NE * self.keep

  def step(self, decay_NE: Array, h_NE: Array) -> Array:
    """Returns h_NE, the state after the token."""
    return decay_NE * h_NE + (self.dt_E * self.x_E)[None] * self.b_N[:, None]


def _row(ref: Ref, token: Array) -> Array:
  return ref[token, :].astype(jnp.float32)


def _sigmoid(x: Array) -> Array:
  return 1 / (1 + jnp.exp(-x))


def _silu(x: Array) -> Array:
  return x * _sigmoid(x)


def _softplus(x: Array) -> Array:
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _token(source: Source, masks: Masks, bias_E: Array | None, token: Array) -> _Token:
  dt_E, slope_E = _row(source.dt_BTE, token), None
  if bias_E is not None:
    dt_E += bias_E
    dt_E, slope_E = _softplus(dt_E), _sigmoid(dt_E)
    if masks.valid is not None:
      valid = masks.valid[token]
      dt_E, slope_E = dt_E * valid, slope_E * valid
  return _Token(
      dt_E, slope_E, _row(source.x_BTE, token), _row(source.b_BTN, token),
      None if masks.keep is None else masks.keep[token],
  )


class States:
  """Loads and stores states, in the layout that kernels compute with: a channel in each thread.

  From an array of consecutive addresses the compiler would load four channels a thread and give
  each warp its own part of N, and use that layout for all arithmetic. So it must not see that
  the channels, an input of kernels, are consecutive.

  Args:
    channels: the numbers of the block's channels, 0, 1, ... E - 1, int32 [E].
    state_size: N.
  """

  def __init__(self, channels: Ref, state_size: int) -> None:
    shape = state_size, channels.shape[0]
    self._where = (
        jax.lax.broadcasted_iota(jnp.int32, shape, 0), jnp.broadcast_to(channels[...][None], shape)
    )

  def load(self, ref: Ref, *index: Array) -> Array:
    """Returns `ref[*index]`, [N, E]."""
    return ref[(*index, *self._where)]

  def store(self, ref: Ref, value: Array, *index: Array) -> None:
    """Sets `ref[*index]`."""
    ref[(*index, *self._where)] = value


def _group(first: Array, size: int) -> list[Array]:
  """Returns the numbers of a group's tokens."""
  return [first + token for token in range(size)]


def _whole(ref: Ref | None) -> Array | None:
  return None if ref is None else ref[...]


class _Finish(NamedTuple):
  """The epilogue at one token, float32, after (y + skip x) silu(z)."""

  skip_E: Array | None
  x_E: Array | None
  z_E: Array | None

  @classmethod
  def of(cls, epilogue: Epilogue, skip_E: Array | None, own_x: Ref, token: Array) -> "_Finish":
    """Loads a token; an epilogue with `skip` and without x takes the recurrence's own."""
    x_E = None
    if skip_E is not None:
      x_E = _row(own_x if epilogue.x is None else epilogue.x, token)
    return cls(skip_E, x_E, None if epilogue.z is None else _row(epilogue.z, token))

  def skipped(self, y_E: Array) -> Array:
    """Returns y + skip x."""
    if self.skip_E is None:
      return y_E
    assert self.x_E is not None
    return y_E + self.skip_E * self.x_E

  def gate(self) -> Array | None:
    """Returns silu(z)."""
    return None if self.z_E is None else _silu(self.z_E)

  def slope(self) -> Array:
    """Returns the derivative of silu(z)."""
    assert self.z_E is not None
    half = _sigmoid(self.z_E)
    return half * (1 + self.z_E * (1 - half))


def forward_kernel(
    sources: tuple[Source, ...],
    epilogue: Epilogue,
    masks: Masks,
    channels: Ref,
    y: Ref,
    final: Ref,
    before: tuple[Ref, ...],
    *,
    chunk: int,
) -> None:
  """Computes the epilogue of the sum of gated reads.

  Args:
    sources: the recurrences.
    epilogue: what follows.
    masks: resets and padding.
    channels: see `States`.
    y: the result [T, E], an output.
    final: the first source's last state, an output.
    before: each source's state before each chunk [T / C, N, E], outputs; empty if not saved.
    chunk: C.
  """
  states = States(channels, final.shape[0])
  rates = [states.load(source.a_NE) for source in sources]
  biases = [_whole(source.bias_E) for source in sources]
  skip_E = _whole(epilogue.skip)

  def run_group(first: Array, h: tuple[Array, ...]) -> tuple[Array, ...]:
    numbers = _group(first, GROUP)
    loaded = [
        [_token(source, masks, bias, number) for source, bias in zip(sources, biases, strict=True)]
        for number in numbers
    ]
    queries = [[_row(source.c_BTN, number) for source in sources] for number in numbers]
    gates = [[_gate(source, number) for source in sources] for number in numbers]
    ends = [_Finish.of(epilogue, skip_E, sources[0].x_BTE, number) for number in numbers]
    results = []
    for tokens, c, gate, end in zip(loaded, queries, gates, ends, strict=True):
      after, reads = [], []
      for index, token in enumerate(tokens):
        h_NE = token.step(token.decay(rates[index]), h[index])
        after.append(h_NE)
        reads.append(_gated(gate[index], jnp.sum(h_NE * c[index][:, None], axis=0)))
      h = tuple(after)
      y_E = end.skipped(functools.reduce(jnp.add, reads))
      silu_E = end.gate()
      results.append(y_E if silu_E is None else y_E * silu_E)
    for number, y_E in zip(numbers, results, strict=True):
      y[number, :] = y_E.astype(y.dtype)
    return h

  def run_chunk(index: Array, h: tuple[Array, ...]) -> tuple[Array, ...]:
    for ref, h_NE in zip(before, h[: len(before)], strict=True):
      states.store(ref, h_NE, index)
    return _loop(
        chunk // GROUP, lambda group, h: run_group(index * chunk + group * GROUP, h), h
    )

  start = tuple(states.load(source.initial_BNE) for source in sources)
  states.store(final, _loop(y.shape[0] // chunk, run_chunk, start)[0])


def _loop(count: int, body: Callable[[Array, Any], Any], carry: Any) -> Any:
  return jax.lax.fori_loop(0, count, body, carry)


def _gate(source: Source, token: Array) -> Array | None:
  return None if source.gate_BTE is None else _row(source.gate_BTE, token)


def _gated(gate_E: Array | None, y_E: Array) -> Array:
  return y_E if gate_E is None else gate_E * y_E


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scratch:
  """Memory of one program of the backward kernel, which no other one sees.

  Attributes:
    states: the state before each group of a chunk, [C / GROUP_BACK, N, E].
    y: the sum of reads at a chunk's tokens, [C, E]; None if nothing needs it.
  """

  states: Array
  y: Array | None


class _Carry(NamedTuple):
  """Sums over the tokens done so far, of one source."""

  dh_NE: Array
  da_NE: Array
  dbias_E: Array | None


def backward_kernel(
    sources: tuple[Source, ...],
    epilogue: Epilogue,
    masks: Masks,
    channels: Ref,
    before: tuple[Ref, ...],
    dy: Ref,
    dfinal: Ref,
    dsources: tuple[Source, ...],
    depilogue: Epilogue,
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
    dsources: the sources' gradients, outputs; those of A and the bias are of one row, and those of
      B and C of one block of channels.
    depilogue: the epilogue's gradients, outputs; that of `skip` is of one row.
    scratch: see `Scratch`.
    chunk: C.
    barrier: makes what the program's threads wrote visible to each other.
  """
  count = dy.shape[0] // chunk
  skip_E = _whole(epilogue.skip)
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
          number, _whole(source.bias_E), states.load(source.a_NE),
      )
      _loop(
          chunk // GROUP_BACK, functools.partial(adjoint.forward_group, first),
          states.load(before[number], index),
      )
      barrier()
      carry = carries[number]
      after.append(_loop(
          chunk // GROUP_BACK, functools.partial(adjoint.backward_group, first, chunk), carry
      ))
      barrier()
    if epilogue.skip is not None or epilogue.z is not None:
      dskip_E = _loop(
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
          zeros if number else states.load(dfinal), zeros, None if source.bias_E is None else zeros_E
      )
      for number, source in enumerate(sources)
  ]
  carries, dskip_E = _loop(count, run_chunk, (start, None if skip_E is None else zeros_E))
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
  gradient: Source
  epilogue: Epilogue
  depilogue: Epilogue
  masks: Masks
  states: States
  scratch: Scratch
  dy: Ref
  skip_E: Array | None
  number: int
  bias_E: Array | None
  a_NE: Array

  def _tokens(self, numbers: Sequence[Array]) -> list[_Token]:
    return [_token(self.source, self.masks, self.bias_E, number) for number in numbers]

  def forward_group(self, first: Array, group: Array, h_NE: Array) -> Array:
    """Writes the state before a group, and adds reads to the chunk's; returns the state after."""
    self.states.store(self.scratch.states, h_NE, group)
    numbers = _group(first + group * GROUP_BACK, GROUP_BACK)
    tokens, reads = self._tokens(numbers), self.scratch.y
    c = [_row(self.source.c_BTN, number) for number in numbers]
    gates = [_gate(self.source, number) for number in numbers]
    sums = []
    for token, c_N, gate_E in zip(tokens, c, gates, strict=True):
      h_NE = token.step(token.decay(self.a_NE), h_NE)
      if reads is not None:
        sums.append(_gated(gate_E, jnp.sum(h_NE * c_N[:, None], axis=0)))
    for number, y_E in zip(numbers, sums):
      row = number - first
      reads[row, :] = y_E if self.number == 0 else reads[row, :] + y_E
    return h_NE

  def backward_group(
      self, first: Array, chunk: int, group: Array, carry: _Carry
  ) -> _Carry:
    """Runs a group of tokens in reverse, and writes their gradients."""
    group = chunk // GROUP_BACK - 1 - group
    numbers = _group(first + group * GROUP_BACK, GROUP_BACK)
    tokens = self._tokens(numbers)
    gates = [_gate(self.source, number) for number in numbers]
    cotangents = [self._before_epilogue(number) for number in numbers]
    states = [self.states.load(self.scratch.states, group)]
    for token in tokens:
      states.append(token.step(token.decay(self.a_NE), states[-1]))

    dh_NE, da_NE, dbias_E = carry
    results = []
    for index in reversed(range(GROUP_BACK)):
      number, token, dy_E, gate_E = numbers[index], tokens[index], cotangents[index], gates[index]
      b_N, c_N = _row(self.source.b_BTN, number), _row(self.source.c_BTN, number)
      dgate_E = None
      if gate_E is not None:
        dgate_E = dy_E * jnp.sum(states[index + 1] * c_N[:, None], axis=0)
      dread_E = _gated(gate_E, dy_E)
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
    dy_E = _row(self.dy, number)
    return dy_E if self.epilogue.z is None else dy_E * _silu(_row(self.epilogue.z, number))


def _epilogue_group(
    first: Array, epilogue: Epilogue, depilogue: Epilogue, own_x: Ref, scratch: Scratch, dy: Ref,
    skip_E: Array | None, group: Array, dskip_E: Array | None,
) -> Array | None:
  """Writes the epilogue's gradients of a group, and adds to that of `skip`."""
  numbers = _group(first + group * GROUP_BACK, GROUP_BACK)
  ends = [_Finish.of(epilogue, skip_E, own_x, number) for number in numbers]
  cotangents = [_row(dy, number) for number in numbers]
  reads = [None if scratch.y is None else scratch.y[number - first, :] for number in numbers]
  for number, end, dy_E, y_E in zip(numbers, ends, cotangents, reads, strict=True):
    if y_E is not None:
      dz_E = dy_E * end.skipped(y_E) * end.slope()
      depilogue.z[number, :] = dz_E.astype(depilogue.z.dtype)
    silu_E = end.gate()
    if silu_E is not None:
      dy_E *= silu_E
    if skip_E is not None:
      dskip_E += dy_E * end.x_E
    if depilogue.x is not None:
      depilogue.x[number, :] = (skip_E * dy_E).astype(depilogue.x.dtype)
  return dskip_E


def synchronise() -> None:
  """Waits for all threads of a program; what they wrote before is then visible to all."""
  triton.debug_barrier()
