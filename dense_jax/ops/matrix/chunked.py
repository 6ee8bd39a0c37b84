"""Matrix-state recurrences (retention, SSD) as matmuls over chunks.

    h_t = a_t h_{t-1} + v_t k_t^T        y_t = h_t q_t

This is the "chunkwise" form of arXiv 2307.08621, section 2.3, in two functions. `chunk_states`
computes the state before each chunk: one matmul per chunk, then a scan over G = T / C chunks.
`chunk_read` answers any query from those states and the tokens inside each chunk. All decays
are exponentials of differences <= 0 of summed log decays (see `log_decay.py`). There is no
normalisation per chunk, so every chunk length gives the same result.

Heads may share keys and queries (arXiv 2405.21060, section 7.2): head h uses those of group
h // (H / J). Whatever depends on keys and queries alone is computed once per group.
"""

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops import affine
from dense_jax.ops.chunks import chunk_ends, chunk_length, split_time
from dense_jax.ops.matrix.log_decay import LogDecay, summed_log_decay, weight
from dense_jax.types import Array

# Tokens per chunk. Work inside chunks grows with C, the number of kept states with 1 / C.
DEFAULT_CHUNK = 128


def _cumulative(
    log_decay_BTH: Array, resets_BT: Array | None, chunk: int
) -> tuple[LogDecay, Array | None]:
  """Returns the summed log decay and the number of resets within each chunk, both inclusive."""
  sum_BGCH = summed_log_decay(log_decay_BTH, chunk)
  if resets_BT is None:
    return sum_BGCH, None
  return sum_BGCH, jnp.cumsum(split_time(resets_BT, chunk), axis=2, dtype=jnp.int32)


def _by_group(x: Array, groups: int, axis: int) -> Array:
  """Splits the axis of heads, [..., H, ...] -> [..., J, H / J, ...]."""
  return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def chunk_states(
    k_BTJN: Array,
    v_BTHP: Array,
    log_decay_BTH: Array,
    resets_BT: Array | None,
    initial_BHPN: Array,
    *,
    associative: bool = False,
    chunk: int = 0,
) -> tuple[Array, Array]:
  """Computes the states between chunks.

  Args:
    k_BTJN: keys, zero at padding.
    v_BTHP: values, in the keys' dtype.
    log_decay_BTH: float32, <= 0, zero at padding; its B may be 1 (a decay that all rows share).
    resets_BT: bool, true where the state is cleared before the token; None means never.
    initial_BHPN: float32 state before the first token.
    associative: scans chunks by `jax.lax.associative_scan` instead of `jax.lax.scan`.
    chunk: tokens per chunk; 0 means DEFAULT_CHUNK.

  Returns:
    before_BGHPN, the state before each chunk, and final_BHPN; both float32.
  """
  batch, time, groups, state_size = k_BTJN.shape
  heads, channels = v_BTHP.shape[2:]
  chex.assert_shape(v_BTHP, (batch, time, heads, channels))
  chex.assert_is_divisible(heads, groups)
  chex.assert_shape(log_decay_BTH, (None, time, heads))
  chex.assert_shape(initial_BHPN, (batch, heads, channels, state_size))
  chex.assert_type([log_decay_BTH, initial_BHPN], jnp.float32)
  chunk = chunk_length(chunk, DEFAULT_CHUNK, time)
  k_BGCJN, v_BGCHP = split_time(k_BTJN, chunk), split_time(v_BTHP, chunk)
  sum_BGCH, count_BGC = _cumulative(log_decay_BTH, resets_BT, chunk)

  same_document = carried = None
  if count_BGC is not None:
    same_document = (count_BGC == count_BGC[:, :, -1:])[..., None]
    carried = (count_BGC[:, :, -1] == 0)[..., None]
  last_BGCH = sum_BGCH[:, :, -1:]
  # The last token's weight is 1, a constant. Computed as exp(A_C - A_C), it would have a gradient
  # of two halves that cancel up to rounding, which may far exceed the gradients of strong decays.
  is_end_BGCH = chunk_ends(time, chunk)[None, :, :, None]
  to_end_BGCH = weight(same_document, jnp.where(is_end_BGCH, 0.0, last_BGCH.since(sum_BGCH)))
  decay_BGH = weight(carried, last_BGCH.total()[:, :, 0])
  decay_BGH = jnp.broadcast_to(decay_BGH, (batch, *decay_BGH.shape[1:]))
  weighted_BGCHP = (v_BGCHP * to_end_BGCH[..., None]).astype(v_BTHP.dtype)
  # j: a group of heads, r: a head within it.
  added_BGHPN = jnp.einsum(
      "bgcjrp,bgcjn->bgjrpn",
      _by_group(weighted_BGCHP, groups, 3),
      k_BGCJN,
      preferred_element_type=jnp.float32,
  ).reshape(batch, -1, heads, channels, state_size)

  if associative:
    decay_BGH, sum_BGHPN = jax.lax.associative_scan(
        affine.compose, (decay_BGH, added_BGHPN), axis=1
    )
    after_BGHPN = decay_BGH[..., None, None] * initial_BHPN[:, None] + sum_BGHPN
    before_BGHPN = jnp.concatenate([initial_BHPN[:, None], after_BGHPN[:, :-1]], axis=1)
    return before_BGHPN, after_BGHPN[:, -1]

  def step(h_BHPN: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
    decay_BH, added_BHPN = inputs
    return decay_BH[..., None, None] * h_BHPN + added_BHPN, h_BHPN

  chunks_first = (jnp.moveaxis(decay_BGH, 1, 0), jnp.moveaxis(added_BGHPN, 1, 0))
  final_BHPN, before_GBHPN = jax.lax.scan(step, initial_BHPN, chunks_first)
  return jnp.moveaxis(before_GBHPN, 0, 1), final_BHPN


def chunk_read(
    q_BTJN: Array,
    k_BTJN: Array,
    v_BTHP: Array,
    log_decay_BTH: Array,
    resets_BT: Array | None,
    before_BGHPN: Array,
    *,
    chunk: int = 0,
) -> Array:
  """Computes the read y_t = h_t q_t from the states between chunks.

  Args:
    q_BTJN: queries, in the keys' dtype.
    k_BTJN: keys; these and the arguments not named here are those of `chunk_states`.
    v_BTHP: values.
    log_decay_BTH: float32, <= 0.
    resets_BT: bool.
    before_BGHPN: the state before each chunk, from `chunk_states`.
    chunk: tokens per chunk, the same as there.

  Returns:
    y_BTHP, float32.
  """
  batch, time, groups, _ = q_BTJN.shape
  chex.assert_equal_shape([q_BTJN, k_BTJN])
  heads, channels = v_BTHP.shape[2:]
  chunk = chunk_length(chunk, DEFAULT_CHUNK, time)
  q_BGCJN, k_BGCJN, v_BGCHP = (split_time(x, chunk) for x in (q_BTJN, k_BTJN, v_BTHP))
  sum_BGCH, count_BGC = _cumulative(log_decay_BTH, resets_BT, chunk)

  # Scores: query position c, key position s; j: a group of heads, r: a head within it.
  earlier = jnp.tril(jnp.ones((chunk, chunk), bool), -1)[None, None, None]
  carried = None
  if count_BGC is not None:
    same = count_BGC[:, :, :, None] == count_BGC[:, :, None, :]
    earlier = earlier & same[:, :, None]
    carried = (count_BGC == 0)[..., None]
  sum_BGHC = jax.tree.map(lambda x: jnp.swapaxes(x, 2, 3), sum_BGCH)
  log_weight_BGHCC = sum_BGHC[..., :, None].since(sum_BGHC[..., None, :])
  # A token's weight for itself is the constant 1 too.
  decay_BGHCC = weight(earlier, log_weight_BGHCC) + jnp.eye(chunk)[None, None, None]
  scores_BGJCC = jnp.einsum(
      "bgcjn,bgsjn->bgjcs", q_BGCJN, k_BGCJN, preferred_element_type=jnp.float32
  )
  weights = scores_BGJCC[:, :, :, None] * _by_group(decay_BGHCC, groups, 2)
  y = jnp.einsum(
      "bgjrcs,bgsjrp->bgcjrp",
      weights.astype(v_BTHP.dtype),
      _by_group(v_BGCHP, groups, 3),
      preferred_element_type=jnp.float32,
  )
  from_start_BGCH = weight(carried, sum_BGCH.total())
  y = y + _by_group(from_start_BGCH, groups, 3)[..., None] * jnp.einsum(
      "bgcjn,bgjrpn->bgcjrp",
      q_BGCJN,
      _by_group(before_BGHPN.astype(q_BTJN.dtype), groups, 2),
      preferred_element_type=jnp.float32,
  )
  return y.reshape(batch, -1, heads, channels)[:, :time]
