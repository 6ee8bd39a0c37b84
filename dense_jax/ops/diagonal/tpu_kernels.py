"""Selective kernels, each for one chunk of tokens and one tile of channels.

In this file C is the tokens of one group (of GROUP tokens), E the channels of one tile, and the
fields of a `Diagonal` are references to blocks of the arrays that they name, read and written by
index.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.types import Array

# Tokens whose steps are unrolled together: the rows of a bfloat16 tile, to keep blocks aligned.
GROUP = 16

Ref: TypeAlias = Any
"""A Pallas reference to a block in memory."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal:
  """One selective recurrence, with the query and gate of its read.

  Attributes:
    dt_BTE: step sizes >= 0, float32 or bfloat16; zero leaves the state unchanged.
    a_NE: float32 decay rates <= 0.
    x_BTE: inputs, float32 or bfloat16.
    b_BTN: input maps, float32 or bfloat16.
    c_BTN: queries, float32 or bfloat16.
    gate_BTE: factors of the read, float32 or bfloat16; None means 1.
    initial_BNE: float32 state before the first token.
  """

  dt_BTE: Array
  a_NE: Array
  x_BTE: Array
  b_BTN: Array
  c_BTN: Array
  gate_BTE: Array | None
  initial_BNE: Array


class _Tokens(NamedTuple):
  """A group of tokens of one source, float32. B and C are transposed: a column per token."""

  dt_CE: Array
  x_CE: Array
  u_CE: Array
  b_NC: Array
  c_NC: Array
  keep_CE: Array | None

  def decay(self, a_NE: Array, token: int) -> Array:
    """Returns decay_NE, the factor of the state before the token."""
    decay_NE = jnp.exp(_row(self.dt_CE, token) * a_NE)
    return decay_NE if self.keep_CE is None else decay_NE * _row(self.keep_CE, token)

  def step(self, a_NE: Array, h_NE: Array, token: int) -> Array:
    """Returns h_NE, the state after the token."""
    u_NE = _row(self.u_CE, token) * _column(self.b_NC, token)
    return self.decay(a_NE, token) * h_NE + u_NE


def _row(x_CE: Array, token: int) -> Array:
  return x_CE[token : token + 1, :]


def _column(x_NC: Array, token: int) -> Array:
  return x_NC[:, token : token + 1]


def _rows(group: Array) -> Any:
  """Returns a group's slice of a chunk's rows, marked as aligned for Mosaic."""
  return pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)


def _load(ref: Ref, rows: Any) -> Array:
  return ref[rows, :].astype(jnp.float32)


def _tokens(source: Diagonal, keep: Ref, rows: Any) -> _Tokens:
  dt_CE, x_CE = _load(source.dt_BTE, rows), _load(source.x_BTE, rows)
  return _Tokens(
      dt_CE=dt_CE,
      x_CE=x_CE,
      u_CE=dt_CE * x_CE,
      b_NC=_load(source.b_BTN, rows).T,
      c_NC=_load(source.c_BTN, rows).T,
      keep_CE=None if keep is None else jnp.broadcast_to(_load(keep, rows), dt_CE.shape),
  )


def _stack(rows: Sequence[Array]) -> Array:
  return jnp.concatenate(rows, axis=0)


def forward_kernel(
    sources: tuple[Diagonal, ...],
    keep: Ref,
    y: Ref,
    final: Ref,
    before: tuple[Ref, ...],
    states: Ref,
) -> None:
  """Computes the sum of gated reads of one chunk and tile.

  Args:
    sources: the recurrences.
    keep: 1, or 0 where the state is cleared before the token, [tokens, 1]; None means no resets.
    y: the sum of gated reads, an output.
    final: the first source's state after the chunk, an output.
    before: each source's state before the chunk, outputs; empty if not saved.
    states: scratch [S, tiles, N, E], the states between chunks.
  """
  chunk, tile = pl.program_id(1), pl.program_id(2)

  @pl.when(chunk == 0)
  def _start() -> None:
    for index, source in enumerate(sources):
      states[index, tile] = source.initial_BNE[...]

  for index, ref in enumerate(before):
    ref[...] = states[index, tile]
  a = [source.a_NE[...] for source in sources]

  def group(number: Array, h: tuple[Array, ...]) -> tuple[Array, ...]:
    rows = _rows(number)
    y_CE = jnp.zeros((GROUP, y.shape[1]), jnp.float32)
    after = []
    for source, a_NE, h_NE in zip(sources, a, h, strict=True):
      tokens = _tokens(source, keep, rows)
      reads = []
      for token in range(GROUP):
        h_NE = tokens.step(a_NE, h_NE, token)
        reads.append(jnp.sum(h_NE * _column(tokens.c_NC, token), axis=0, keepdims=True))
      after.append(h_NE)
      read_CE = _stack(reads)
      y_CE += read_CE if source.gate_BTE is None else read_CE * _load(source.gate_BTE, rows)
    y[rows, :] = y_CE
    return tuple(after)

  start = tuple(states[index, tile] for index in range(len(sources)))
  after = jax.lax.fori_loop(0, y.shape[0] // GROUP, group, start)
  for index, h_NE in enumerate(after):
    states[index, tile] = h_NE
  final[...] = after[0]


def backward_kernel(
    sources: tuple[Diagonal, ...],
    keep: Ref,
    before: tuple[Ref, ...],
    dy: Ref,
    dfinal: Ref,
    gradients: tuple[Diagonal, ...],
    states: Ref,
    carry: Ref,
    da: Ref,
) -> None:
  """Computes the gradients of one chunk and tile; chunks are visited in reverse.

  Args:
    sources: the recurrences.
    keep: as in `forward_kernel`.
    before: each source's state before the chunk.
    dy: the gradient of the sum of reads.
    dfinal: the gradient of the first source's last state.
    gradients: the sources' gradients, outputs.
    states: scratch [tokens + 1, N, E], a chunk's states after the one before it.
    carry: scratch [S, tiles, N, E], the gradient of the state before the chunks done so far.
    da: scratch [S, tiles, N, E], the gradient of A from the chunks done so far.
  """
  chunk, tile = pl.program_id(1), pl.program_id(2)

  @pl.when(chunk == 0)
  def _start() -> None:
    for index in range(len(sources)):
      first = dfinal[...] if index == 0 else jnp.zeros(dfinal.shape, jnp.float32)
      carry[index, tile] = first
      da[index, tile] = jnp.zeros(dfinal.shape, jnp.float32)

  @pl.when(tile == 0)
  def _start_maps() -> None:
    for gradient in gradients:
      gradient.b_BTN[...] = jnp.zeros(gradient.b_BTN.shape, jnp.float32)
      gradient.c_BTN[...] = jnp.zeros(gradient.c_BTN.shape, jnp.float32)

  for index, (source, gradient) in enumerate(zip(sources, gradients, strict=True)):
    states[0] = before[index][...]
    _make_states(source, keep, states)
    carry[index, tile], da[index, tile] = _adjoint(
        source, keep, dy, gradient, states, carry[index, tile], da[index, tile]
    )
    gradient.initial_BNE[...] = carry[index, tile]
    gradient.a_NE[...] = da[index, tile]


def _make_states(source: Diagonal, keep: Ref, states: Ref) -> None:
  """Fills `states` [tokens + 1, N, E], of which the first is given."""
  a_NE = source.a_NE[...]

  def group(number: Array, h_NE: Array) -> Array:
    tokens = _tokens(source, keep, _rows(number))
    for token in range(GROUP):
      h_NE = tokens.step(a_NE, h_NE, token)
      states[number * GROUP + token + 1] = h_NE
    return h_NE

  jax.lax.fori_loop(0, source.x_BTE.shape[0] // GROUP, group, states[0])


def _adjoint(
    source: Diagonal,
    keep: Ref,
    dy: Ref,
    gradient: Diagonal,
    states: Ref,
    carry_NE: Array,
    da_NE: Array,
) -> tuple[Array, Array]:
  """Runs one source's chunk in reverse, and writes the gradients of its tokens.

  Returns:
    The gradient of the state before the chunk, and `da_NE` plus the chunk's gradient of A.
  """
  groups = source.x_BTE.shape[0] // GROUP
  a_NE = source.a_NE[...]

  def group(number: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
    carry_NE, da_NE = carried
    number = groups - 1 - number
    rows = _rows(number)
    tokens = _tokens(source, keep, rows)
    dread_CE = dy_CE = _load(dy, rows)
    if source.gate_BTE is not None:
      dread_CE = dy_CE * _load(source.gate_BTE, rows)
    du, ddecay, reads, db, dc = [], [], [], [], []
    h_NE = states[number * GROUP + GROUP]
    for token in reversed(range(GROUP)):
      b_N1, c_N1 = _column(tokens.b_NC, token), _column(tokens.c_NC, token)
      dread_1E = _row(dread_CE, token)
      if source.gate_BTE is not None:
        reads.append(jnp.sum(h_NE * c_N1, axis=0, keepdims=True))
      dc.append(jnp.sum(h_NE * dread_1E, axis=1, keepdims=True))
      dh_NE = carry_NE + c_N1 * dread_1E
      db.append(jnp.sum(dh_NE * _row(tokens.u_CE, token), axis=1, keepdims=True))
      du.append(jnp.sum(dh_NE * b_N1, axis=0, keepdims=True))
      carry_NE = dh_NE * tokens.decay(a_NE, token)
      h_NE = states[number * GROUP + token]
      dlog_NE = carry_NE * h_NE  # The gradient with respect to dt A, the log decay.
      ddecay.append(jnp.sum(dlog_NE * a_NE, axis=0, keepdims=True))
      da_NE += dlog_NE * _row(tokens.dt_CE, token)

    du_CE = _stack(du[::-1])
    ddt_CE = du_CE * tokens.x_CE + _stack(ddecay[::-1])
    gradient.dt_BTE[rows, :] = ddt_CE.astype(gradient.dt_BTE.dtype)
    gradient.x_BTE[rows, :] = (du_CE * tokens.dt_CE).astype(gradient.x_BTE.dtype)
    gradient.b_BTN[rows, :] += jnp.concatenate(db[::-1], axis=1).T
    gradient.c_BTN[rows, :] += jnp.concatenate(dc[::-1], axis=1).T
    if gradient.gate_BTE is not None:
      dgate_CE = dy_CE * _stack(reads[::-1])
      gradient.gate_BTE[rows, :] = dgate_CE.astype(gradient.gate_BTE.dtype)
    return carry_NE, da_NE

  return jax.lax.fori_loop(0, groups, group, (carry_NE, da_NE))
