"""Attention by blocks with a running softmax: memory is linear in T, on every platform.

Forward, after arXiv 2205.14135: one scan over the pairs of a block of queries and a block of keys
that some window reaches, with the running maximum m, the sum l and the sum of values of the
queries' block. Kept for the backward pass are the outputs and log z_t = m_t + log l_t, from which
it computes each pair's weights again:

    p_ts = exp(s_ts - log z_t),    ds_ts = p_ts (dy_t . v_s - dy_t . y_t)

Pairs that no window reaches, half of all without a short window, are never visited. Scores,
weights' sums and all accumulators are float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.ops.attention.reference import Documents, check_shapes
from dense_jax.types import Array

# Tokens of a block of queries or keys. Larger blocks are fewer steps and larger scores.
BLOCK = 512
# Below all scores, and finite: the difference of two of them is 0, not NaN.
_MASKED = -1e30


class _Layout(NamedTuple):
  """Static numbers.

  Attributes:
    query_block, key_block: tokens of a block of queries, and of keys.
    window: W.
    offset: S - T, the positions before the first query.
  """

  query_block: int
  key_block: int
  window: int
  offset: int


def blockwise_attention(
    q_BTHN: Array, k_BSJN: Array, v_BSJN: Array, documents: Documents | None, window: int,
    *, block: int = BLOCK,
) -> Array:
  """Computes attention block by block; see `Attend`. It has reverse-mode derivatives only.

  Args:
    q_BTHN: queries.
    k_BSJN: keys.
    v_BSJN: values.
    documents: None means that each row is one document.
    window: W.
    block: the most tokens of a block.
  """
  check_shapes(q_BTHN, k_BSJN, v_BSJN)
  (batch, time, heads, size), (_, positions, groups, _) = q_BTHN.shape, k_BSJN.shape
  layout = _Layout(min(block, time), min(block, positions), window, positions - time)
  q_BJRTN = q_BTHN.reshape(batch, time, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
  # Padding follows all positions, so that causality hides it from them.
  padded_q = _padded(q_BJRTN, layout.query_block, 3)
  k_BJSN, v_BJSN = (_padded(jnp.swapaxes(x, 1, 2), layout.key_block, 2) for x in (k_BSJN, v_BSJN))
  if documents is not None:
    documents = Documents(
        _padded(documents.queries_BT, layout.query_block, 1),
        _padded(documents.keys_BS, layout.key_block, 1),
    )
  y_BJRTN = _attend(padded_q, k_BJSN, v_BJSN, documents, layout)[:, :, :, :time]
  return y_BJRTN.transpose(0, 3, 1, 2, 4).reshape(q_BTHN.shape)


def _padded(x: Array, block: int, axis: int) -> Array:
  """Pads an axis at its end with zeros up to a multiple of `block`."""
  extra = -x.shape[axis] % block
  widths = [(0, extra if each == axis else 0) for each in range(x.ndim)]
  return jnp.pad(x, widths) if extra else x


def _pairs(queries: int, keys: int, layout: _Layout) -> tuple[Array, Array, Array]:
  """Returns the pairs of blocks that windows reach.

  Args:
    queries: the number of queries, padding included.
    keys: the number of keys, padding included.
    layout: see `_Layout`.

  Returns:
    For each pair, int32: the blocks of queries and of keys, and 1 for a block's first pair.
  """
  pairs = []
  for row in range(queries // layout.query_block):
    first = layout.offset + row * layout.query_block
    lowest = max(0, first - layout.window + 1) // layout.key_block
    highest = (min(first + layout.query_block, keys) - 1) // layout.key_block
    # A block of padding alone may reach no key.
    pairs += [(row, column, column == lowest) for column in range(lowest, highest + 1)]
  rows, columns, begins = np.asarray(pairs, np.int32).T
  return jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(begins)


def _part(x: Array, index: Array, block: int, axis: int) -> Array:
  """Returns one block of an axis."""
  return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _with_part(x: Array, part: Array, index: Array, axis: int) -> Array:
  """Inverts `_part`: replaces one block of an axis."""
  return jax.lax.dynamic_update_slice_in_dim(x, part, index * part.shape[axis], axis)


def _scores(
    q_BJRCN: Array, k_BJSN: Array, documents: Documents | None, row: Array, column: Array,
    layout: _Layout,
) -> tuple[Array, Array]:
  """Returns the scores [B, J, R, C, S] of a pair of blocks, float32, and where they count."""
  query_C = layout.offset + row * layout.query_block + jnp.arange(layout.query_block)
  key_S = column * layout.key_block + jnp.arange(layout.key_block)
  distance_CS = query_C[:, None] - key_S[None]
  mask_BCS = ((distance_CS >= 0) & (distance_CS < layout.window))[None]
  if documents is not None:
    queries_BC = _part(documents.queries_BT, row, layout.query_block, 1)
    keys_BS = _part(documents.keys_BS, column, layout.key_block, 1)
    mask_BCS = mask_BCS & (queries_BC[:, :, None] == keys_BS[:, None])
  scores = jnp.einsum("bjrcn,bjsn->bjrcs", q_BJRCN, k_BJSN, preferred_element_type=jnp.float32)
  return scores / math.sqrt(k_BJSN.shape[-1]), mask_BCS[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BJRTN: Array, k_BJSN: Array, v_BJSN: Array, documents: Documents | None, layout: _Layout
) -> Array:
  return _forward(q_BJRTN, k_BJSN, v_BJSN, documents, layout)[0]


_Pair = tuple[Array, Array, Array]
_Carry = tuple[Array, Array, Array, Array, Array]


def _forward(
    q_BJRTN: Array, k_BJSN: Array, v_BJSN: Array, documents: Documents | None, layout: _Layout
) -> tuple[Array, tuple[Array, Array]]:
  """Returns y and log z."""
  shape = (*q_BJRTN.shape[:3], layout.query_block)

  def step(carry: _Carry, pair: _Pair) -> tuple[_Carry, None]:
    sum_BJRCN, most_BJRC, mass_BJRC, y_BJRTN, log_z_BJRT = carry
    row, column, begins = pair
    most_BJRC = jnp.where(begins == 1, _MASKED, most_BJRC)
    scores, mask = _scores(
        _part(q_BJRTN, row, layout.query_block, 3), _part(k_BJSN, column, layout.key_block, 2),
        documents, row, column, layout,
    )
    before_BJRC = most_BJRC
    most_BJRC = jnp.maximum(most_BJRC, jnp.max(jnp.where(mask, scores, _MASKED), axis=-1))
    weights = jnp.where(mask, jnp.exp(scores - most_BJRC[..., None]), 0.0)
    # Of a block's first pair, what the carry holds is of another block.
    keep_BJRC = jnp.where(begins == 1, 0.0, jnp.exp(before_BJRC - most_BJRC))
    mass_BJRC = keep_BJRC * mass_BJRC + jnp.sum(weights, axis=-1)
    sum_BJRCN = keep_BJRC[..., None] * sum_BJRCN + jnp.einsum(
        "bjrcs,bjsn->bjrcn", weights.astype(v_BJSN.dtype),
        _part(v_BJSN, column, layout.key_block, 2), preferred_element_type=jnp.float32,
    )
    # A block's last pair has the last word. By then every query has seen at least itself.
    total_BJRC = jnp.where(mass_BJRC > 0, mass_BJRC, 1.0)
    y_BJRCN = (sum_BJRCN / total_BJRC[..., None]).astype(y_BJRTN.dtype)
    y_BJRTN = _with_part(y_BJRTN, y_BJRCN, row, 3)
    log_z_BJRT = _with_part(log_z_BJRT, most_BJRC + jnp.log(total_BJRC), row, 3)
    return (sum_BJRCN, most_BJRC, mass_BJRC, y_BJRTN, log_z_BJRT), None

  zeros = jnp.zeros(shape, jnp.float32)
  initial = (
      jnp.zeros((*shape, q_BJRTN.shape[-1]), jnp.float32), zeros, zeros, jnp.zeros_like(q_BJRTN),
      jnp.zeros(q_BJRTN.shape[:-1], jnp.float32),
  )
  pairs = _pairs(q_BJRTN.shape[3], k_BJSN.shape[2], layout)
  (*_, y_BJRTN, log_z_BJRT), _ = jax.lax.scan(step, initial, pairs)
  return y_BJRTN, (y_BJRTN, log_z_BJRT)


def _forward_rule(
    q_BJRTN: Array, k_BJSN: Array, v_BJSN: Array, documents: Documents | None, layout: _Layout
) -> tuple[Array, tuple[Any, ...]]:
  y_BJRTN, kept = _forward(q_BJRTN, k_BJSN, v_BJSN, documents, layout)
  return y_BJRTN, (q_BJRTN, k_BJSN, v_BJSN, documents, *kept)


def _backward_rule(
    layout: _Layout, saved: tuple[Any, ...], d_y_BJRTN: Array
) -> tuple[Array, Array, Array, None]:
  q_BJRTN, k_BJSN, v_BJSN, documents, y_BJRTN, log_z_BJRT = saved
  own_BJRT = jnp.einsum(
      "bjrtn,bjrtn->bjrt", d_y_BJRTN, y_BJRTN, preferred_element_type=jnp.float32
  )

  def step(carry: tuple[Array, ...], pair: _Pair) -> tuple[tuple[Array, ...], None]:
    d_q, d_k, d_v = carry
    row, column, _ = pair
    q, d_y, log_z, own = (
        _part(x, row, layout.query_block, 3) for x in (q_BJRTN, d_y_BJRTN, log_z_BJRT, own_BJRT)
    )
    k, v = (_part(x, column, layout.key_block, 2) for x in (k_BJSN, v_BJSN))
    scores, mask = _scores(q, k, documents, row, column, layout)
    weights = jnp.where(mask, jnp.exp(scores - log_z[..., None]), 0.0)
    d_weights = jnp.einsum("bjrcn,bjsn->bjrcs", d_y, v, preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights - own[..., None]) / math.sqrt(k.shape[-1])
    weights, d_scores = weights.astype(v.dtype), d_scores.astype(k.dtype)

    def add(total: Array, subscripts: str, x: Array, y: Array, index: Array, axis: int) -> Array:
      more = jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
      part = _part(total, index, more.shape[axis], axis)
      return _with_part(total, part + more, index, axis)

    d_q = add(d_q, "bjrcs,bjsn->bjrcn", d_scores, k, row, 3)
    d_k = add(d_k, "bjrcs,bjrcn->bjsn", d_scores, q, column, 2)
    d_v = add(d_v, "bjrcs,bjrcn->bjsn", weights, d_y, column, 2)
    return (d_q, d_k, d_v), None

  inputs = (q_BJRTN, k_BJSN, v_BJSN)
  pairs = _pairs(q_BJRTN.shape[3], k_BJSN.shape[2], layout)
  gradients, _ = jax.lax.scan(
      step, tuple(jnp.zeros(x.shape, jnp.float32) for x in inputs), pairs
  )
  d_q, d_k, d_v = (d_x.astype(x.dtype) for d_x, x in zip(gradients, inputs, strict=True))
  return d_q, d_k, d_v, None


_attend.defvjp(_forward_rule, _backward_rule)
