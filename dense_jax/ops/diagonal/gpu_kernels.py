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
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dense_jax.ops.diagonal.kernel_inputs import LowRank, Source, Wide
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matmul import kernel_dot
from dense_jax.ops.triton_functions import sigmoid, silu, silu_slope, softplus
from dense_jax.types import Array

# Tokens whose loads are issued together, before the state that waits for them: a load from main
# memory takes as long as several tokens' arithmetic.
GROUP = 8
# Tokens of a product that are computed at a time, at most.
ROWS = 64

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


class Rows(NamedTuple):
  """E numbers a token: the reference to an array of them, and which token it begins with.

  A product's array is scratch memory that holds one chunk of it.
  """

  ref: Ref
  first: Array | int

  @classmethod
  def of(cls, wide: Wide, product: Ref, first: Array) -> "Rows":
    """Returns the rows of an input; `product` is that of the chunk that begins at `first`."""
    return cls(product, first) if isinstance(wide, LowRank) else cls(wide, 0)

  def load(self, token: Array) -> Array:
    """Loads one token, float32."""
    return row(self.ref, token - self.first)


class Gate(NamedTuple):
  """A gate of reads; `is_product` says that its rows are those before silu."""

  rows: Rows
  is_product: bool

  @classmethod
  def of(cls, wide: Wide, product: Ref, first: Array) -> "Gate":
    """Returns a gate; the arguments are those of `Rows.of`."""
    return cls(Rows.of(wide, product, first), isinstance(wide, LowRank))

  def load(self, token: Array) -> Array:
    """Loads the gate of one token, float32."""
    gate_E = self.rows.load(token)
    return silu(gate_E) if self.is_product else gate_E


def multiply(wide: Wide, product: Ref, first: Array) -> None:
  """Computes a product for the chunk that begins at `first`; an array needs nothing."""
  if not isinstance(wide, LowRank):
    return
  chunk = product.shape[0]
  size = min(chunk & -chunk, ROWS)
  up_RE = wide.up_RE[...]

  def rows(index: Array, carry: tuple[()]) -> tuple[()]:
    hidden_CR = wide.hidden_BTR[pl.ds(first + index * size, size), :]
    product_CE = kernel_dot(hidden_CR, up_RE, (1, 0))
    product[pl.ds(index * size, size), :] = product_CE.astype(product.dtype)
    return carry

  loop(chunk // size, rows, ())


def load_token(
    source: Source, steps: Rows, masks: Masks, bias_E: Array | None, token: Array
) -> Token:
  """Loads a token of a source, and makes its step size if the source has a bias."""
  dt_E, slope_E = steps.load(token), None
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
    return silu_slope(self.z_E)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Products:
  """Scratch memory for a chunk of each product, [C, E]; None where an input is an array.

  Attributes:
    steps: those of the sources' step sizes.
    gates: those of the gates.
  """

  steps: tuple[Any, ...]
  gates: tuple[Any, ...]


def forward_kernel(
    sources: tuple[Source, ...],
    gates: tuple[Wide, ...],
    epilogue: Epilogue,
    masks: Masks,
    channels: Ref,
    y: Ref,
    final: Ref,
    before: tuple[Ref, ...],
    products: Products,
    *,
    chunk: int,
    barrier: Callable[[], None],
) -> None:
  """Computes the epilogue of the sum of gated reads.

  Args:
    sources: the recurrences.
    gates: the gates of their reads.
    epilogue: what follows.
    masks: resets and padding.
    channels: see `States`.
    y: the result [T, E], an output.
    final: the first source's last state, an output.
    before: each source's state before each chunk [T / C, N, E], outputs; empty if not saved.
    products: see `Products`.
    chunk: C.
    barrier: makes what the program's threads wrote visible to each other.
  """
  states = States(channels, final.shape[0])
  rates = [states.load(source.a_NE) for source in sources]
  biases = [whole(source.bias_E) for source in sources]
  skip_E = whole(epilogue.skip)
  inputs = [
      *zip([source.dt for source in sources], products.steps, strict=True),
      *zip(gates, products.gates, strict=True),
  ]

  def run_group(
      chunk_first: Array, group: Array, h: tuple[Array, ...]
  ) -> tuple[Array, ...]:
    numbers = group_numbers(chunk_first + group * GROUP, GROUP)
    rows = [Rows.of(wide, product, chunk_first) for wide, product in inputs[: len(sources)]]
    factors = [Gate.of(wide, product, chunk_first) for wide, product in inputs[len(sources) :]]
    loaded = [
        [
            load_token(source, steps, masks, bias_E, number)
            for source, steps, bias_E in zip(sources, rows, biases, strict=True)
        ]
        for number in numbers
    ]
    queries = [[row(source.c_BTN, number) for source in sources] for number in numbers]
    values = [[factor.load(number) for factor in factors] for number in numbers]
    ends = [Finish.of(epilogue, skip_E, sources[0].x_BTE, number) for number in numbers]
    results = []
    for tokens, c, gate, end in zip(loaded, queries, values, ends, strict=True):
      after, reads = [], []
      for index, (source, token) in enumerate(zip(sources, tokens, strict=True)):
        h_NE = token.step(token.decay(rates[index]), h[index])
        after.append(h_NE)
        read_E = jnp.sum(h_NE * c[index][:, None], axis=0)
        reads.append(read_E if source.gate is None else gate[source.gate] * read_E)
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
    first = index * chunk
    for wide, product in inputs:
      multiply(wide, product, first)
    if jax.tree.leaves(products):
      barrier()
    h = loop(chunk // GROUP, functools.partial(run_group, first), h)
    if jax.tree.leaves(products):
      barrier()  # The next chunk's products take the place of those that were read here.
    return h

  start = tuple(states.load(source.initial_BNE) for source in sources)
  states.store(final, loop(y.shape[0] // chunk, run_chunk, start)[0])


def loop(count: int, body: Callable[[Array, Any], Any], carry: Any) -> Any:
  """Runs carry = body(index, carry) for the indices below `count`."""
  return jax.lax.fori_loop(0, count, body, carry)


def synchronise() -> None:
  """Waits for all threads of a program; what they wrote before is then visible to all."""
  triton.debug_barrier()
