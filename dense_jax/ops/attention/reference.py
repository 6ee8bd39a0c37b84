"""The specification of attention: all scores at once, in float32.

    y_t = sum_{s in window(t)} softmax_s(q_t . k_s / sqrt(N)) v_s

The queries belong to the last T of S positions. The window of a query holds the last W positions
up to and including its own, as far as they are of its document. Query head h uses the keys and
values of head h // (H / J).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp

from dense_jax.types import Array


class Documents(NamedTuple):
  """The number of each position's document, int32; a batch axis of size 1 means all rows.

  Attributes:
    queries_BT: the queries' documents.
    keys_BS: the keys' documents. A key whose number no query has is never attended to.
  """

  queries_BT: Array
  keys_BS: Array


Attend = Callable[[Array, Array, Array, Documents | None, int], Array]
"""Attention: (q_BTHN, k_BSJN, v_BSJN, documents, window) -> y_BTHN in the dtype of q.

S >= T. Documents of None mean that each row is one document. `window` is W >= 1."""


def check_shapes(q_BTHN: Array, k_BSJN: Array, v_BSJN: Array) -> None:
  """Asserts that the shapes of queries, keys and values go together."""
  chex.assert_equal_shape([k_BSJN, v_BSJN])
  batch, time, heads, size = q_BTHN.shape
  chex.assert_shape(k_BSJN, (batch, None, None, size))
  chex.assert_is_divisible(heads, k_BSJN.shape[2])
  chex.assert_scalar_non_negative(k_BSJN.shape[1] - time)


def window_mask(time: int, positions: int, documents: Documents | None, window: int) -> Array:
  """Returns a bool mask [B, T, S] (B may be 1), true where a query attends to a key."""
  distance_TS = jnp.arange(time)[:, None] + (positions - time) - jnp.arange(positions)[None]
  mask_BTS = ((distance_TS >= 0) & (distance_TS < window))[None]
  if documents is None:
    return mask_BTS
  return mask_BTS & (documents.queries_BT[:, :, None] == documents.keys_BS[:, None])


def softmax_attention(
    q_BTHN: Array, k_BSJN: Array, v_BSJN: Array, documents: Documents | None, window: int
) -> Array:
  """Computes attention with an array of all scores [B, H, T, S]; see `Attend`."""
  check_shapes(q_BTHN, k_BSJN, v_BSJN)
  (batch, time, heads, size), (_, positions, groups, _) = q_BTHN.shape, k_BSJN.shape
  mask_BTS = window_mask(time, positions, documents, window)
  q_BTJRN = q_BTHN.reshape(batch, time, groups, heads // groups, size)
  scores_BJRTS = jnp.einsum(
      "btjrn,bsjn->bjrts", q_BTJRN, k_BSJN, preferred_element_type=jnp.float32
  ) / math.sqrt(size)
  scores_BJRTS = jnp.where(mask_BTS[:, None, None], scores_BJRTS, -jnp.inf)
  weights_BJRTS = jnp.exp(scores_BJRTS - jnp.max(scores_BJRTS, axis=-1, keepdims=True))
  weights_BJRTS = weights_BJRTS / jnp.sum(weights_BJRTS, axis=-1, keepdims=True)
  y_BTJRN = jnp.einsum(
      "bjrts,bsjn->btjrn", weights_BJRTS.astype(v_BSJN.dtype), v_BSJN,
      preferred_element_type=jnp.float32,
  )
  return y_BTJRN.reshape(q_BTHN.shape).astype(q_BTHN.dtype)
