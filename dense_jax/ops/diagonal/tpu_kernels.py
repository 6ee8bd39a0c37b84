"""Selective kernels, each for one chunk of tokens and one tile of channels.

In this file C is the tokens of one group (of GROUP tokens), E the channels of one tile, and the
fields of `Source` and `Epilogue` are references to blocks of the arrays that they name, read and
written by index; vectors of E numbers are blocks [1, E].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.diagonal.kernel_inputs import Source
from dense_jax.ops.epilogue import Epilogue
from dense_jax.types import Array

# Tokens whose steps are unrolled together: the rows of a bfloat16 tile, to keep blocks aligned.
GROUP = 16

Ref: TypeAlias = Any
"""A Pallas reference to a block in memory."""


class _Tokens(NamedTuple):
  """A group of tokens of one source, float32. B and C are transposed: a column per token.

  `slope_CE` is the derivative of dt by what it is made of; None if step sizes are given.
  """

  dt_CE: Array
  slope_CE: Array | None
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

  def read(self, h_NE: Array, token: int) -> Array:
    """Returns C h of one token, [1, E]."""
    return jnp.sum(h_NE * _column(self.c_NC, token), axis=0, keepdims=True)


def _row(x_CE: Array, token: int) -> Array:
  return x_CE[token : token + 1, :]


def _column(x_NC: Array, token: int) -> Array:
  return x_NC[:, token : token + 1]


def _rows(group: Array) -> Any:
  """Returns a group's slice of a chunk's rows, marked as aligned for Mosaic."""
  return pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)


def _load(ref: Ref, rows: Any) -> Array:
  return ref[rows, :].astype(jnp.float32)


def _tokens(source: Source, masks: Ref, rows: Any) -> _Tokens:
  dt_CE, x_CE = _load(source.dt_BTE, rows), _load(source.x_BTE, rows)
  slope_CE = keep_CE = None
  if masks is not None:
    masks_C2 = masks[rows, :]
    keep_CE = jnp.broadcast_to(masks_C2[:, :1], dt_CE.shape)
  if source.bias_E is not None:
    dt_CE += source.bias_E[...]
    slope_CE = jax.nn.sigmoid(dt_CE)
    dt_CE = jnp.maximum(dt_CE, 0) + jnp.log1p(jnp.exp(-jnp.abs(dt_CE)))
    if masks is not None:
      dt_CE, slope_CE = dt_CE * masks_C2[:, 1:], slope_CE * masks_C2[:, 1:]
  return _Tokens(
      dt_CE=dt_CE,
      slope_CE=slope_CE,
      x_CE=x_CE,
      u_CE=dt_CE * x_CE,
      b_NC=_load(source.b_BTN, rows).T,
      c_NC=_load(source.c_BTN, rows).T,
      keep_CE=keep_CE,
  )


def _stack(rows: Sequence[Array]) -> Array:
  return jnp.concatenate(rows, axis=0)


def _gated(source: Source, y_CE: Array, rows: Any) -> Array:
  """Multiplies a read, or its gradient, by the source's gate."""
  return y_CE if source.gate_BTE is None else y_CE * _load(source.gate_BTE, rows)


def _skip_input(epilogue: Epilogue, sources: Sequence[Source]) -> Ref:
  """Returns what `skip` multiplies: without an x of the epilogue, that of the first source."""
  return sources[0].x_BTE if epilogue.x is None else epilogue.x


def forward_kernel(
    sources: tuple[Source, ...],
    epilogue: Epilogue,
    masks: Ref,
    y: Ref,
    final: Ref,
    before: tuple[Ref, ...],
    states: Ref,
) -> None:
  """Computes the epilogue of the sum of gated reads of one chunk and tile.

  Args:
    sources: the recurrences.
    epilogue: what follows; if it has `skip` and no x, x is that of the first source.
    masks: [tokens, 2]: 1, or 0 where the state is cleared before the token; 1, or 0 where a step
      size that is made here is zero. None means all 1.
    y: the result, an output.
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
      tokens = _tokens(source, masks, rows)
      reads = []
      for token in range(GROUP):
        h_NE = tokens.step(a_NE, h_NE, token)
        reads.append(tokens.read(h_NE, token))
      after.append(h_NE)
      y_CE += _gated(source, _stack(reads), rows)
    if epilogue.skip is not None:
      y_CE += epilogue.skip[...] * _load(_skip_input(epilogue, sources), rows)
    if epilogue.z is not None:
      y_CE *= jax.nn.silu(_load(epilogue.z, rows))
    y[rows, :] = y_CE.astype(y.dtype)
    return tuple(after)

  start = tuple(states[index, tile] for index in range(len(sources)))
  after = jax.lax.fori_loop(0, y.shape[0] // GROUP, group, start)
  for index, h_NE in enumerate(after):
    states[index, tile] = h_NE
  final[...] = after[0]


def backward_kernel(
    sources: tuple[Source, ...],
    epilogue: Epilogue,
    masks: Ref,
    before: tuple[Ref, ...],
    dy: Ref,
    dfinal: Ref,
    gradients: tuple[Any, ...],
    depilogue: Any,
    states: Ref,
    reads: Ref,
    carry: Ref,
    da: Ref,
    dvectors: Ref,
) -> None:
  """Computes the gradients of one chunk and tile; chunks are visited in reverse.

  Args:
    sources: the recurrences.
    epilogue: what follows.
    masks: as in `forward_kernel`.
    before: each source's state before the chunk.
    dy: the gradient of the result.
    dfinal: the gradient of the first source's last state.
    gradients: the sources' gradients, each a `Source`, outputs; those of A and the bias are of
      one row.
    depilogue: the epilogue's gradients, an `Epilogue`, outputs; that of `skip` is of one row.
    states: scratch [tokens + 1, N, E], a chunk's states after the one before it.
    reads: scratch [tokens, E], the sum of reads; None if nothing needs it.
    carry: scratch [S, tiles, N, E], the gradient of the state before the chunks done so far.
    da: scratch [S, tiles, N, E], the gradient of A from the chunks done so far.
    dvectors: scratch [S + 1, tiles, 1, E], those of the biases and of `skip`.
  """
  chunk, tile = pl.program_id(1), pl.program_id(2)

  @pl.when(chunk == 0)
  def _start() -> None:
    for index in range(len(sources) + 1):
      dvectors[index, tile] = jnp.zeros((1, dy.shape[1]), jnp.float32)
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
    _make_states(source, masks, states, reads, first=index == 0)
    skip = epilogue.skip if index == 0 and epilogue.x is None else None
    carry[index, tile], da[index, tile], dvectors[index, tile] = _adjoint(
        source, epilogue, masks, skip, dy, gradient, states,
        (carry[index, tile], da[index, tile], dvectors[index, tile]),
    )
    gradient.initial_BNE[...] = carry[index, tile]
    gradient.a_NE[...] = da[index, tile]
    if gradient.bias_E is not None:
      gradient.bias_E[...] = dvectors[index, tile]
  if epilogue.skip is not None or epilogue.z is not None:
    dvectors[len(sources), tile] = _epilogue_gradients(
        epilogue, depilogue, _skip_input(epilogue, sources), reads, dy,
        dvectors[len(sources), tile],
    )
  if depilogue.skip is not None:
    depilogue.skip[...] = dvectors[len(sources), tile]


def _make_states(source: Source, masks: Ref, states: Ref, reads: Ref, *, first: bool) -> None:
  """Fills `states` [tokens + 1, N, E], of which the first is given, and adds to `reads`."""
  a_NE = source.a_NE[...]

  def group(number: Array, h_NE: Array) -> Array:
    rows = _rows(number)
    tokens = _tokens(source, masks, rows)
    read = []
    for token in range(GROUP):
      h_NE = tokens.step(a_NE, h_NE, token)
      states[number * GROUP + token + 1] = h_NE
      if reads is not None:
        read.append(tokens.read(h_NE, token))
    if reads is not None:
      y_CE = _gated(source, _stack(read), rows)
      reads[rows, :] = y_CE if first else reads[rows, :] + y_CE
    return h_NE

  jax.lax.fori_loop(0, source.x_BTE.shape[0] // GROUP, group, states[0])


def _before_epilogue(epilogue: Epilogue, dy: Ref, rows: Any) -> Array:
  """Returns the gradient of the sum of reads."""
  dy_CE = _load(dy, rows)
  return dy_CE if epilogue.z is None else dy_CE * jax.nn.silu(_load(epilogue.z, rows))


def _adjoint(
    source: Source,
    epilogue: Epilogue,
    masks: Ref,
    skip: Ref,
    dy: Ref,
    gradient: Any,
    states: Ref,
    carried: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
  """Runs one source's chunk in reverse, and writes the gradients of its tokens.

  Args:
    source: the recurrence.
    epilogue: what follows.
    masks: as in `forward_kernel`.
    skip: the factor of the source's x in the epilogue; None means 0.
    dy: the gradient of the result.
    gradient: the source's gradient, an output.
    states: the chunk's states after the one before it.
    carried: the gradients of the state after the chunk, of A and of the bias so far.

  Returns:
    `carried`, with the gradient of the state before the chunk and the chunk's parts of the others.
  """
  groups = source.x_BTE.shape[0] // GROUP
  a_NE = source.a_NE[...]

  def group(number: Array, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    carry_NE, da_NE, dbias_1E = carried
    number = groups - 1 - number
    rows = _rows(number)
    tokens = _tokens(source, masks, rows)
    dsum_CE = _before_epilogue(epilogue, dy, rows)
    dread_CE = _gated(source, dsum_CE, rows)
    du, ddecay, reads, db, dc = [], [], [], [], []
    h_NE = states[number * GROUP + GROUP]
    for token in reversed(range(GROUP)):
      b_N1, c_N1 = _column(tokens.b_NC, token), _column(tokens.c_NC, token)
      dread_1E = _row(dread_CE, token)
      if source.gate_BTE is not None:
        reads.append(tokens.read(h_NE, token))
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
    if tokens.slope_CE is not None:
      ddt_CE *= tokens.slope_CE
      dbias_1E += jnp.sum(ddt_CE, axis=0, keepdims=True)
    dx_CE = du_CE * tokens.dt_CE
    if skip is not None:
      dx_CE += skip[...] * dsum_CE
    gradient.dt_BTE[rows, :] = ddt_CE.astype(gradient.dt_BTE.dtype)
    gradient.x_BTE[rows, :] = dx_CE.astype(gradient.x_BTE.dtype)
    gradient.b_BTN[rows, :] += jnp.concatenate(db[::-1], axis=1).T
    gradient.c_BTN[rows, :] += jnp.concatenate(dc[::-1], axis=1).T
    if gradient.gate_BTE is not None:
      dgate_CE = dsum_CE * _stack(reads[::-1])
      gradient.gate_BTE[rows, :] = dgate_CE.astype(gradient.gate_BTE.dtype)
    return carry_NE, da_NE, dbias_1E

  return jax.lax.fori_loop(0, groups, group, carried)


def _epilogue_gradients(
    epilogue: Epilogue, depilogue: Any, x: Ref, reads: Ref, dy: Ref, dskip_1E: Array
) -> Array:
  """Writes the epilogue's gradients of a chunk; returns that of `skip`, added to `dskip_1E`."""

  def group(number: Array, dskip_1E: Array) -> Array:
    rows = _rows(number)
    dsum_CE = _before_epilogue(epilogue, dy, rows)
    if epilogue.z is not None:
      y_CE, z_CE = reads[rows, :], _load(epilogue.z, rows)
      if epilogue.skip is not None:
        y_CE += epilogue.skip[...] * _load(x, rows)
      half_CE = jax.nn.sigmoid(z_CE)
      dz_CE = _load(dy, rows) * y_CE * half_CE * (1 + z_CE * (1 - half_CE))
      depilogue.z[rows, :] = dz_CE.astype(depilogue.z.dtype)
    if epilogue.skip is not None:
      dskip_1E += jnp.sum(dsum_CE * _load(x, rows), axis=0, keepdims=True)
    if epilogue.skip is not None and depilogue.x is not None:
      dx_CE = epilogue.skip[...] * dsum_CE
      depilogue.x[rows, :] = dx_CE.astype(depilogue.x.dtype)
    return dskip_1E

  return jax.lax.fori_loop(0, dy.shape[0] // GROUP, group, dskip_1E)
