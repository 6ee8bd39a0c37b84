"""Time-invariant systems by chunks, float32: exact with documents and carried states.

In two functions, as in `dense_jax.ops.matrix.chunked`: `lti_chunk_states` computes the state
before each chunk, and `lti_chunk_read` answers any query from those states and the tokens inside
each chunk.

Letter of this file alone: Q query positions in a chunk, C then being key positions.
"""

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import chunk_length, split_time
from dense_jax.ops.lti.system import System, contract
from dense_jax.ops.token_scan import token_scan
from dense_jax.types import Array

# Tokens per chunk. Measured with one layer, forward and backward, on two CPU cores that had
# other work too (8 x 256 tokens, E 256, N 64): S4D takes 0.09 s at 16, 0.10 at 32 and 0.15 at
# 64, S4 0.10, 0.10 and 0.17; documents change little. The number of kept states falls with 1 / C.
DEFAULT_CHUNK = 32


def lti_chunk_states(
    system: System,
    x_BTE: Array,
    resets_BT: Array | None,
    valid_BT: Array | None,
    initial_BNE: Array,
    *,
    chunk: int = 0,
) -> tuple[Array, Array]:
  """Computes the states between chunks.

  Args:
    system: the discretised systems.
    x_BTE: inputs.
    resets_BT: bool, true where the state is cleared before the token; None means never.
    valid_BT: bool, false at padding, which may only follow a row's last token; None means no
      padding.
    initial_BNE: float32 state before the first token.
    chunk: tokens per chunk; 0 means DEFAULT_CHUNK.

  Returns:
    before_BGNE, the state before each chunk, and final_BNE, the state after each row's last
    valid token; both float32.
  """
  batch, time, width = x_BTE.shape
  chex.assert_shape(initial_BNE, (batch, None, width))
  chex.assert_type(initial_BNE, jnp.float32)
  chunk = chunk_length(chunk, DEFAULT_CHUNK, time)
  x_BGCE = split_time(x_BTE.astype(jnp.float32), chunk)
  resets_BGC = carried_BG = None
  inputs_BGCE = x_BGCE
  if resets_BT is not None:
    resets_BGC = split_time(resets_BT, chunk)
    count_BGC = jnp.cumsum(resets_BGC, axis=2, dtype=jnp.int32)
    last_BG1 = count_BGC[:, :, -1:]
    carried_BG = last_BG1[..., 0] == 0
    inputs_BGCE = jnp.where((count_BGC == last_BG1)[..., None], x_BGCE, 0)
  to_end_CNE = system.input_powers(chunk)[::-1]
  added_BGNE = contract("bgce,cne->bgne", inputs_BGCE, to_end_CNE)
  advance = system.advance(chunk)

  def step(h_BNE: Array, inputs: tuple[Array, Array | None]) -> tuple[Array, Array]:
    added_BNE, carried_B = inputs
    after_BNE = advance(h_BNE)
    if carried_B is not None:
      after_BNE = jnp.where(carried_B[:, None, None], after_BNE, 0)
    return after_BNE + added_BNE, h_BNE

  chunks_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (added_BGNE, carried_BG))
  final_BNE, before_GBNE = jax.lax.scan(step, initial_BNE, chunks_first)
  before_BGNE = jnp.moveaxis(before_GBNE, 0, 1)
  if valid_BT is None and time % chunk == 0:
    return before_BGNE, final_BNE

  # Padding would advance the state, so each row's last state is computed again, token by token
  # inside the chunk in which the row ends.
  if valid_BT is None:
    lengths_B = jnp.full(batch, time)
  else:
    lengths_B = jnp.sum(valid_BT, axis=1, dtype=jnp.int32)
  where_B = jnp.maximum(lengths_B - 1, 0) // chunk
  take = (jnp.arange(batch), where_B)
  active_BC = jnp.arange(chunk)[None] < (lengths_B - where_B * chunk)[:, None]
  resets_BC = None if resets_BGC is None else resets_BGC[take]
  _, final_BNE = token_scan(
      system.stepper(), lambda h_BNE, _: h_BNE[:, 0], before_BGNE[take], (x_BGCE[take],), None,
      resets_BC, active_BC,
  )
  return before_BGNE, final_BNE


def _toeplitz(k_CE: Array) -> Array:
  """Returns the Toeplitz matrices [E, C, Q] with k[q - c] at [e, c, q], zero where q < c."""
  chunk = k_CE.shape[0]
  # Copies of length 2 C, cut into rows of 2 C - 1: each row is shifted by one more position.
  copies = jnp.tile(jnp.pad(k_CE.T, ((0, 0), (0, chunk))), (1, chunk))
  skewed = copies[:, : chunk * (2 * chunk - 1)].reshape(-1, chunk, 2 * chunk - 1)
  return skewed[:, :, :chunk]


@jax.custom_vjp
def _by_document(k_ECQ: Array, x_EBGC: Array, count_BGC: Array) -> Array:
  """Computes the sum over c of k_ECQ x_EBGC, for c in q's document only, [E, B, G, Q].

  Runs one matmul for each document of the fullest chunk, mostly two to four. Forward and
  backward, that is 6 ms of the measurement at DEFAULT_CHUNK. A masked sum over the lags takes
  28 ms (without documents 17 ms, where one matmul takes 2 ms). The loop's length depends on
  data, which JAX cannot differentiate in reverse, so the gradient is defined below.
  """

  def body(document: Array, y_EBGQ: Array) -> Array:
    mask = (count_BGC == document)[None]
    return jnp.where(mask, contract("ebgc,ecq->ebgq", jnp.where(mask, x_EBGC, 0), k_ECQ), y_EBGQ)

  return jax.lax.fori_loop(0, jnp.max(count_BGC) + 1, body, jnp.zeros_like(x_EBGC))


def _by_document_forward(
    k_ECQ: Array, x_EBGC: Array, count_BGC: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
  return _by_document(k_ECQ, x_EBGC, count_BGC), (k_ECQ, x_EBGC, count_BGC)


def _by_document_backward(
    saved: tuple[Array, Array, Array], gradient_EBGQ: Array
) -> tuple[Array, Array, None]:
  k_ECQ, x_EBGC, count_BGC = saved

  def body(document: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
    by_k_ECQ, by_x_EBGC = sums
    mask = (count_BGC == document)[None]
    gradient = jnp.where(mask, gradient_EBGQ, 0)
    by_k_ECQ += contract("ebgc,ebgq->ecq", jnp.where(mask, x_EBGC, 0), gradient)
    return by_k_ECQ, jnp.where(mask, contract("ebgq,ecq->ebgc", gradient, k_ECQ), by_x_EBGC)

  zero = jnp.zeros_like(k_ECQ), jnp.zeros_like(x_EBGC)
  return *jax.lax.fori_loop(0, jnp.max(count_BGC) + 1, body, zero), None


_by_document.defvjp(_by_document_forward, _by_document_backward)


def _inside(k_CE: Array, x_BGCE: Array, count_BGC: Array | None) -> Array:
  """Computes each token's read of itself and of earlier tokens of its chunk and document."""
  k_ECQ, x_EBGC = _toeplitz(k_CE), jnp.moveaxis(x_BGCE, 3, 0)
  if count_BGC is None:
    y_EBGQ = contract("ebgc,ecq->ebgq", x_EBGC, k_ECQ)
  else:
    y_EBGQ = _by_document(k_ECQ, x_EBGC, count_BGC)
  return jnp.moveaxis(y_EBGQ, 0, 3)


def lti_chunk_read(
    system: System,
    c_EN: Array,
    x_BTE: Array,
    resets_BT: Array | None,
    before_BGNE: Array,
    *,
    chunk: int = 0,
) -> Array:
  """Computes y_BTE = c h_t, float32, from the states between chunks.

  c_EN are the queries, one per channel; the other arguments are those of `lti_chunk_states`.
  Values at padding are undefined.
  """
  batch, time, width = x_BTE.shape
  chunk = chunk_length(chunk, DEFAULT_CHUNK, time)
  chex.assert_shape(before_BGNE, (batch, -(-time // chunk), c_EN.shape[1], width))
  x_BGCE = split_time(x_BTE.astype(jnp.float32), chunk)
  count_BGC = None
  if resets_BT is not None:
    count_BGC = jnp.cumsum(split_time(resets_BT, chunk), axis=2, dtype=jnp.int32)
  k_CE = contract("en,cne->ce", c_EN, system.input_powers(chunk))
  carried_BGCE = contract("cne,bgne->bgce", system.query_powers(c_EN, chunk), before_BGNE)
  if count_BGC is not None:
    carried_BGCE = jnp.where((count_BGC == 0)[..., None], carried_BGCE, 0)
  y_BGCE = _inside(k_CE, x_BGCE, count_BGC) + carried_BGCE
  return y_BGCE.reshape(batch, -1, width)[:, :time]
