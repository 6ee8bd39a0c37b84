"""The forward selective kernel for TPUs, for one chunk of tokens and one tile of channels.

In this file C is the tokens of one group (of GROUP tokens), E the channels of one tile, and the
fields of `Source` and `Epilogue` are references to blocks of the arrays that they name, read and
written by index; vectors of E numbers are blocks [1, E].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.diagonal.kernel_inputs import LowRank, Source, Wide
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matmul import kernel_dot
from dense_jax.types import Array

# Tokens whose steps are unrolled together: the rows of a bfloat16 tile, to keep blocks aligned.
GROUP = 16

Ref: TypeAlias = Any
"""A Pallas reference to a block in memory."""


class Tokens(NamedTuple):
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
    decay_NE = jnp.exp(row(self.dt_CE, token) * a_NE)
    return decay_NE if self.keep_CE is None else decay_NE * row(self.keep_CE, token)

  def step(self, a_NE: Array, h_NE: Array, token: int) -> Array:
    """Returns h_NE, the state after the token."""
    u_NE = row(self.u_CE, token) * column(self.b_NC, token)
    return self.decay(a_NE, token) * h_NE + u_NE

  def read(self, h_NE: Array, token: int) -> Array:
    """Returns C h of one token, [1, E]."""
    return jnp.sum(h_NE * column(self.c_NC, token), axis=0, keepdims=True)


def row(x_CE: Array, token: int) -> Array:
  """Returns one token of a group, [1, E]."""
  return x_CE[token : token + 1, :]


def column(x_NC: Array, token: int) -> Array:
  """Returns one token of a group's maps, [N, 1]."""
  return x_NC[:, token : token + 1]


def rows_of(group: Array) -> Any:
  """Returns a group's slice of a chunk's rows, marked as aligned for Mosaic."""
  return pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)


def load(ref: Ref, rows: Any) -> Array:
  """Loads rows of a block, float32."""
  return ref[rows, :].astype(jnp.float32)


def multiply(wides: Sequence[Wide], products: Ref) -> list[Ref]:
  """Computes the products among inputs for a chunk's tokens, into the scratch `products`.

  Returns:
    For each input the reference to an array of it, [tokens, E]: its own, or that of its product.
  """
  arrays = []
  count = 0
  for wide in wides:
    if isinstance(wide, LowRank):
      product_CE = kernel_dot(wide.hidden_BTR[...], wide.up_RE[...], (1, 0))
      products[count] = product_CE.astype(wide.dtype).astype(products.dtype)
      wide = products.at[count]
      count += 1
    arrays.append(wide)
  return arrays


def gate_before(gate: Wide, array: Ref, rows: Any) -> tuple[Array, Array | None]:
  """Loads a group's gate.

  Args:
    gate: the gate, an input.
    array: the reference to an array of it.
    rows: the group's rows.

  Returns:
    The gate, and what it is silu of; None for one that is given.
  """
  gate_CE = load(array, rows)
  return (jax.nn.silu(gate_CE), gate_CE) if isinstance(gate, LowRank) else (gate_CE, None)


def load_tokens(source: Source, steps: Ref, masks: Ref, rows: Any) -> Tokens:
  """Loads a group's tokens; `steps` is the reference to an array of what makes step sizes."""
  dt_CE, x_CE = load(steps, rows), load(source.x_BTE, rows)
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
  return Tokens(
      dt_CE=dt_CE,
      slope_CE=slope_CE,
      x_CE=x_CE,
      u_CE=dt_CE * x_CE,
      b_NC=load(source.b_BTN, rows).T,
      c_NC=load(source.c_BTN, rows).T,
      keep_CE=keep_CE,
  )


def stack(rows: Sequence[Array]) -> Array:
  """Returns rows [1, E] as one block."""
  return jnp.concatenate(rows, axis=0)


def skip_input(epilogue: Epilogue, sources: Sequence[Source]) -> Ref:
  """Returns what `skip` multiplies: without an x of the epilogue, that of the first source."""
  return sources[0].x_BTE if epilogue.x is None else epilogue.x


def forward_kernel(
    sources: tuple[Source, ...],
    gates: tuple[Wide, ...],
    epilogue: Epilogue,
    masks: Ref,
    y: Ref,
    final: Ref,
    before: tuple[Ref, ...],
    states: Ref,
    products: Ref,
) -> None:
  """Computes the epilogue of the sum of gated reads of one chunk and tile.

  Args:
    sources: the recurrences.
    gates: the gates of their reads.
    epilogue: what follows; if it has `skip` and no x, x is that of the first source.
    masks: [tokens, 2]: 1, or 0 where the state is cleared before the token; 1, or 0 where a step
      size that is made here is zero. None means all 1.
    y: the result, an output.
    final: the first source's state after the chunk, an output.
    before: each source's state before the chunk, outputs; empty if not saved.
    states: scratch [S, tiles, N, E], the states between chunks.
    products: scratch [products, tokens, E]; None if no input is a product.
  """
  chunk, tile = pl.program_id(1), pl.program_id(2)

  @pl.when(chunk == 0)
  def _start() -> None:
    for index, source in enumerate(sources):
      states[index, tile] = source.initial_BNE[...]

  for index, ref in enumerate(before):
    ref[...] = states[index, tile]
  a = [source.a_NE[...] for source in sources]
  arrays = multiply([*(source.dt for source in sources), *gates], products)
  steps, factors = arrays[: len(sources)], arrays[len(sources) :]

  def group(number: Array, h: tuple[Array, ...]) -> tuple[Array, ...]:
    rows = rows_of(number)
    y_CE = jnp.zeros((GROUP, y.shape[1]), jnp.float32)
    after = []
    values = [
        gate_before(gate, array, rows)[0] for gate, array in zip(gates, factors, strict=True)
    ]
    for source, array, a_NE, h_NE in zip(sources, steps, a, h, strict=True):
      tokens = load_tokens(source, array, masks, rows)
      reads = []
      for token in range(GROUP):
        h_NE = tokens.step(a_NE, h_NE, token)
        reads.append(tokens.read(h_NE, token))
      after.append(h_NE)
      read_CE = stack(reads)
      y_CE += read_CE if source.gate is None else values[source.gate] * read_CE
    if epilogue.skip is not None:
      y_CE += epilogue.skip[...] * load(skip_input(epilogue, sources), rows)
    if epilogue.z is not None:
      y_CE *= jax.nn.silu(load(epilogue.z, rows))
    y[rows, :] = y_CE.astype(y.dtype)
    return tuple(after)

  start = tuple(states[index, tile] for index in range(len(sources)))
  after = jax.lax.fori_loop(0, y.shape[0] // GROUP, group, start)
  for index, h_NE in enumerate(after):
    states[index, tile] = h_NE
  final[...] = after[0]
