"""The selective diagonal recurrence (Mamba), in rematerialised chunks.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t h_t

The sequence is scanned chunk by chunk. The backward pass keeps the states between chunks
and computes those inside a chunk again, so [B, T, N, E] never exists. Inside a chunk the
states come from `jax.lax.associative_scan` ("associative") or from a `lax.scan`
("recurrent"), which does less arithmetic and leaves less in memory.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops import reference
from dense_jax.ops.chunks import chunk_length
from dense_jax.ops.matmul import matmul, spread
from dense_jax.ops.token_scan import join_chunks, split_chunks, token_scan
from dense_jax.types import Array

# Tokens a chunk. By the TPU v5e compiler one layer, forward and backward (4 x 2048 tokens,
# E 2048, N 16), token by token, moves 0.92 GB at 8, 0.71 at 16, 0.96 at 32 and 3.10 at 64.
DEFAULT_CHUNK = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepSizes:
  """dt = softplus(low W + bias), as what it is made from: R numbers a token, not E.

  Attributes:
    low_BTR: the low-rank step sizes; in decoding low_BR.
    kernel_RE: float32 map W.
    bias_E: float32.
    valid_BT: bool, false where dt is zero (padding); None is all true.
  """

  low_BTR: Array
  kernel_RE: Array
  bias_E: Array
  valid_BT: Array | None = None

  def dt(self) -> Array:
    """dt_BTE, float32."""
    dt = matmul(self.low_BTR, self.kernel_RE).astype(jnp.float32)
    dt = jax.nn.softplus(dt + spread(self.bias_E, dt))
    return dt if self.valid_BT is None else jnp.where(self.valid_BT[..., None], dt, 0)


def _combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
  """Composes two steps h -> a h + u, the left one first."""
  a_left, u_left = left
  a_right, u_right = right
  return a_left * a_right, a_right * u_left + u_right


def _associative_chunk(
    a_NE: Array, h_BNE: Array, chunk: tuple[Array, Array, Array, Array, Array | None]
) -> tuple[Array, Array]:
  dt_CBE, x_CBE, b_CBN, c_CBN, resets_CB = chunk
  dt_CBE = dt_CBE.astype(jnp.float32)
  decay = jnp.exp(dt_CBE[:, :, None, :] * a_NE[None, None])
  if resets_CB is not None:
    decay = jnp.where(resets_CB[:, :, None, None], 0.0, decay)
  u_CBE = dt_CBE * x_CBE.astype(jnp.float32)
  u = u_CBE[:, :, None, :] * b_CBN.astype(jnp.float32)[..., None]
  decay, u = jax.lax.associative_scan(_combine, (decay, u))
  h = decay * h_BNE[None] + u
  y_CBE = jnp.sum(h * c_CBN.astype(jnp.float32)[..., None], axis=2)
  return h[-1], y_CBE


def _recurrent(
    dt_BTE: Array, a_BNE: Array, x_BTE: Array, b_BTN: Array, c_BTN: Array,
    resets_BT: Array | None, initial_BNE: Array, chunk: int,
) -> tuple[Array, Array]:
  """`selective_scan` token by token."""
  return token_scan(
      functools.partial(reference.diagonal_step, a_BNE), reference.diagonal_read, initial_BNE,
      (dt_BTE, x_BTE, b_BTN), c_BTN, resets_BT, chunk=chunk, unroll=DEFAULT_CHUNK,
  )


def _halves(x: Array) -> Array:
  """[1, T, E] -> [2, T, E / 2]: half the channels a row."""
  return jnp.moveaxis(x.reshape(x.shape[1], 2, -1), 1, 0)


def _joined(x: Array) -> Array:
  """The inverse of `_halves`."""
  return jnp.moveaxis(x, 0, 1).reshape(1, x.shape[1], -1)


def _recurrent_row(
    dt_BTE: Array, a_NE: Array, x_BTE: Array, b_BTN: Array, c_BTN: Array,
    resets_BT: Array | None, initial_BNE: Array, chunk: int,
) -> tuple[Array, Array]:
  """`selective_scan` of one row, as that of two rows of half the channels.

  Channels do not meet, so that it is the same. XLA's CPU backend compiles the unrolled steps
  of a single row into code that is up to 11 times as slow (4096 tokens, E 256, N 16, forward
  and backward: 207 us a token against 19, two cores).
  """

  def twice(x: Array) -> Array:
    return jnp.concatenate([x, x])

  y, final = _recurrent(
      _halves(dt_BTE), _halves(a_NE[None]), _halves(x_BTE), twice(b_BTN), twice(c_BTN),
      None if resets_BT is None else twice(resets_BT), _halves(initial_BNE), chunk,
  )
  return _joined(y), _joined(final)


def selective_scan(
    dt_BTE: Array,
    a_NE: Array,
    x_BTE: Array,
    b_BTN: Array,
    c_BTN: Array,
    resets_BT: Array | None,
    initial_BNE: Array,
    *,
    implementation: str,
    chunk: int = 0,
) -> tuple[Array, Array]:
  """The selective recurrence read with one query (arXiv 2312.00752, algorithm 2).

  Args:
    dt_BTE: step sizes >= 0; zero leaves the state as it is.
    a_NE: float32 decay rates <= 0.
    x_BTE: inputs.
    b_BTN: input maps.
    c_BTN: queries.
    resets_BT: bool, clears the state before a token; None never does.
    initial_BNE: float32 state before the first token.
    implementation: "associative" or "recurrent".
    chunk: tokens a chunk; 0 takes DEFAULT_CHUNK.

  Returns:
    y_BTE and the state after the last token, final_BNE; both float32.
  """
  batch, time, width = x_BTE.shape
  state_size = a_NE.shape[0]
  chex.assert_shape(dt_BTE, (batch, time, width))
  chex.assert_shape([b_BTN, c_BTN], (batch, time, state_size))
  chex.assert_shape(initial_BNE, (batch, state_size, width))
  chex.assert_type([a_NE, initial_BNE], jnp.float32)
  if implementation == "recurrent":
    arguments = b_BTN, c_BTN, resets_BT, initial_BNE, chunk
    if batch == 1 and width % 2 == 0:
      return _recurrent_row(dt_BTE, a_NE, x_BTE, *arguments)
    return _recurrent(dt_BTE, a_NE[None], x_BTE, *arguments)

  chunk = chunk_length(chunk, DEFAULT_CHUNK, time)
  # dt = 0 in the padding: it leaves the state as it is.
  inputs = split_chunks((dt_BTE, x_BTE, b_BTN, c_BTN, resets_BT), chunk)
  body = jax.checkpoint(functools.partial(_associative_chunk, a_NE), prevent_cse=False)
  final_BNE, y = jax.lax.scan(body, initial_BNE, inputs)
  return join_chunks(y, time), final_BNE
