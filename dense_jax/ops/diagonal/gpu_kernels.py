"""Selective kernels for GPUs, each for one row and one block of channels, over all tokens.

In this file T is the tokens of one row, C those of a chunk, E the channels of one block, and the
fields of `Source` and `Epilogue` are references to blocks of the arrays that they name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dense_jax.ops.diagonal.kernel_inputs import Source
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.triton_functions import sigmoid, silu, softplus
from dense_jax.types import Array

# Tokens whose loads are issued together, before the state that waits for them: a load from main
# memory takes as long as several tokens' arithmetic.
GROUP = 8

Ref: TypeAlias = Any
"""A Pallas reference to a block in memory."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
  """The effect of tokens on all sources' states, [B, T] in float32 each; None means all 1.

  Attributes:
    keep: 1, or 0 where the state is cleared before the token.
    valid: 1, or 0 where the step size is zero (padding).
  """

  keep: Array | None
  valid: Array | None


class Token(NamedTuple):
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


def row(ref: Ref, token: Array) -> Array:
  """Loads one token, float32."""
  return ref[token, :].astype(jnp.float32)


def load_token(source: Source, masks: Masks, bias_E: Array | None, token: Array) -> Token:
  """Loads a token of a source, and makes its step size if the source has a bias."""
  dt_E, slope_E = row(source.dt_BTE, token), None
  if bias_E is not None:
    dt_E += bias_E
    dt_E, slope_E = softplus(dt_E), sigmoid(dt_E)
    if masks.valid is not None:
      valid = masks.valid[token]
      dt_E, slope_E = dt_E * valid, slope_E * valid
  return Token(
      dt_E, slope_E, row(source.x_BTE, token), row(source.b_BTN, token),
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


def group_numbers(first: Array, size: int) -> list[Array]:
  """Returns the numbers of a group's tokens."""
  return [first + token for token in range(size)]


def whole(ref: Ref | None) -> Array | None:
  """Loads a block; None stays None."""
  return None if ref is None else ref[...]


class Finish(NamedTuple):
  """The epilogue at one token, float32, after (y + skip x) silu(z)."""

  skip_E: Array | None
  x_E: Array | None
  z_E: Array | None

  @classmethod
  def of(cls, epilogue: Epilogue, skip_E: Array | None, own_x: Ref, token: Array) -> "Finish":
    """Loads a token; an epilogue with `skip` and without x takes the recurrence's own."""
    x_E = None
    if skip_E is not None:
      x_E = row(own_x if epilogue.x is None else epilogue.x, token)
    return cls(skip_E, x_E, None if epilogue.z is None else row(epilogue.z, token))

  def skipped(self, y_E: Array) -> Array:
    """Returns y + skip x."""
    if self.skip_E is None:
      return y_E
    assert self.x_E is not None
    return y_E + self.skip_E * self.x_E

  def gate(self) -> Array | None:
    """Returns silu(z)."""
    return None if self.z_E is None else silu(self.z_E)

  def slope(self) -> Array:
    """Returns the derivative of silu(z)."""
    assert self.z_E is not None
    half = sigmoid(self.z_E)
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
  biased = [(source, whole(source.bias_E)) for source in sources]
  skip_E = whole(epilogue.skip)

  def run_group(first: Array, h: tuple[Array, ...]) -> tuple[Array, ...]:
    numbers = group_numbers(first, GROUP)
    loaded = [
        [load_token(source, masks, bias_E, number) for source, bias_E in biased]
        for number in numbers
    ]
    queries = [[row(source.c_BTN, number) for source in sources] for number in numbers]
    gates = [[load_gate(source, number) for source in sources] for number in numbers]
    ends = [Finish.of(epilogue, skip_E, sources[0].x_BTE, number) for number in numbers]
    results = []
    for tokens, c, gate, end in zip(loaded, queries, gates, ends, strict=True):
      after, reads = [], []
      for index, token in enumerate(tokens):
        h_NE = token.step(token.decay(rates[index]), h[index])
        after.append(h_NE)
        reads.append(gated(gate[index], jnp.sum(h_NE * c[index][:, None], axis=0)))
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
    return loop(
        chunk // GROUP, lambda group, h: run_group(index * chunk + group * GROUP, h), h
    )

  start = tuple(states.load(source.initial_BNE) for source in sources)
  states.store(final, loop(y.shape[0] // chunk, run_chunk, start)[0])


def loop(count: int, body: Callable[[Array, Any], Any], carry: Any) -> Any:
  """Runs carry = body(index, carry) for the indices below `count`."""
  return jax.lax.fori_loop(0, count, body, carry)


def load_gate(source: Source, token: Array) -> Array | None:
  """Loads the gate of a source's read at a token; None means 1."""
  return None if source.gate_BTE is None else row(source.gate_BTE, token)


def gated(gate_E: Array | None, y_E: Array) -> Array:
  """Multiplies a read, or its gradient, by its gate."""
  return y_E if gate_E is None else gate_E * y_E
