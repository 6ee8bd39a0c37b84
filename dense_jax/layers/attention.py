"""Softmax attention with rotary positions: the Transformer baseline.

    q, k, v = W_q u, W_k u, W_v u        q, k = rot(q), rot(k)
    y_t = sum_{s in window(t)} softmax_s(q_t . k_s / sqrt(N)) v_s,        out = W_o y

LLaMA's layer (arXiv 2302.13971): rotary positions (arXiv 2104.09864), key and value heads that
several query heads share (arXiv 2305.13245), and a SwiGLU layer after the mixer. The window of a
token holds the last `context` tokens of its document, itself included.

The cache is a ring buffer: the token at position p of its document is in slot p mod C, where C is
the context. Positions determine which token each slot holds, so the cache stores only keys and
values. In this file C is the context, not a chunk's length, and J is the number of heads of keys
and values.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import Config, ModelConfig, integer, invalid, number
from dense_jax.errors import InputError
from dense_jax.layers.dense.connection import Shared
from dense_jax.layers.feed_forward import FeedForward
from dense_jax.layers.linear import Linear, normal
from dense_jax.layers.mixer import MixerOutput
from dense_jax.ops import resolver, sequence_parallel
from dense_jax.ops.attention.reference import Documents
from dense_jax.ops.rotary import rotate_halves
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Config, key="config.model.mixer"):
  """Options of attention."""

  heads: int = integer(4, 1, help="H: heads of queries")
  kv_heads: int = integer(
      0, 0, help="J: heads of keys and values, a divisor of heads; 0 means heads")
  head_dim: int = integer(0, 0, help="N, even: channels of a head; 0 means D / heads")
  rope_theta: float = number(
      10000.0, 1, open_low=True,
      help="the rotation's angles fall from 1 to nearly 1 / rope_theta radians a token")
  context: int = integer(
      2048, 1, help="tokens that a token attends to at most, itself included: the cache's length")
  ffn_width: int = integer(
      0, 0, help="width of the feed-forward layer; 0 means 8/3 D rounded up to a multiple of 64")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.kv_heads and self.heads % self.kv_heads:
      raise invalid(
          "config.model.mixer.kv_heads", self.kv_heads,
          f"0, or a divisor of heads = {self.heads}",
      )
    if self.head_dim % 2:
      raise invalid("config.model.mixer.head_dim", self.head_dim, "0, or an even integer")


def head_dim(config: ModelConfig) -> int:
  """Returns N, the channels of a head.

  Raises:
    InputError: `head_dim` is 0, and D / heads is not an even integer.
  """
  options: AttentionConfig = config.mixer
  if not options.head_dim and config.width % (2 * options.heads):
    raise invalid(
        "config.model.mixer.heads", options.heads,
        f"an integer whose double divides width = {config.width} (or set head_dim)",
    )
  return options.head_dim or config.width // options.heads


def ffn_width(config: ModelConfig) -> int:
  """Returns the feed-forward layer's width."""
  options: AttentionConfig = config.mixer
  return options.ffn_width or -(-config.width * 8 // (3 * 64)) * 64


def feed_forward(config: ModelConfig, rngs: nnx.Rngs) -> FeedForward:
  """Makes the layer that follows the mixer."""
  return FeedForward(config, ffn_width(config), kind="swiglu", rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
  """The cache of rotated keys and of values, in the model's dtype."""

  k_BCJN: Array
  v_BCJN: Array


class Attention(nnx.Module):
  """Attention as a mixer; see `Mixer`.

  Weights start Gaussian with standard deviation 0.02, divided for the output map by sqrt(2 L).

  Raises:
    InputError: the model has dense connections, or attention no such implementation.
  """

  form: ClassVar[str] = "attention"

  def __init__(self, config: ModelConfig, *, sources: int, rngs: nnx.Rngs) -> None:
    options: AttentionConfig = config.mixer
    del sources
    if config.dense.depth:
      raise invalid(
          "config.model.dense.depth", config.dense.depth,
          "0 with this family: attention has no states that deeper layers could read",
      )
    self.head_dim = head_dim(config)
    self.kv_heads = options.kv_heads or options.heads
    self.theta = options.rope_theta
    self.context = options.context
    self.dtype = jnp.dtype(config.dtype)
    self.attend = resolver.attention_function(config.implementation, self.dtype, self.head_dim)
    query_width, width = options.heads * self.head_dim, self.kv_heads * self.head_dim

    def project(width: int) -> Linear:
      return Linear(config.width, width, axes=("embed", "heads"), init=normal(0.02), rngs=rngs)

    self.q_proj, self.k_proj, self.v_proj = project(query_width), project(width), project(width)
    self.out_proj = Linear(
        query_width, config.width, axes=("heads", "embed"),
        init=normal(0.02 / math.sqrt(2 * config.layers)), rngs=rngs,
    )

  def _project(self, x: Array, position: Array) -> tuple[Array, Array, Array]:
    """Returns rotated q, rotated k, and v, [..., heads, N]."""
    def by_head(x: Array) -> Array:
      return x.reshape(*x.shape[:-1], -1, self.head_dim)

    q, k = (
        rotate_halves(by_head(projected), position, self.theta)
        for projected in (self.q_proj(x), self.k_proj(x))
    )
    return q, k, by_head(self.v_proj(x))

  def __call__(
      self, x_D: Array, tokens: Segments | Token, state: AttentionState | None,
      shallow: Sequence[Shared],
  ) -> MixerOutput:
    """See `Mixer`; a `state` of None means an empty cache.

    Raises:
      InputError: the tokens of a row are split over devices.
    """
    del shallow
    if (parts := sequence_parallel.shards()) > 1:
      raise InputError(
          f"config.mesh.sequence = {parts} is not valid for family=transformer, whose tokens see "
          "all others: expected 1"
      )
    q_HN, k_JN, v_JN = self._project(x_D, tokens.positions)
    if isinstance(tokens, Token):
      y_HN, after = self._attend_token(q_HN, k_JN, v_JN, tokens.positions_B, state)
    else:
      y_HN = self._attend(q_HN, k_JN, v_JN, tokens, state)
      before = self.init_state(x_D.shape[0]) if state is None else state
      after = _ring_after(before, AttentionState(k_JN, v_JN), tokens, self.context)
    return MixerOutput(self.out_proj(y_HN.reshape(*x_D.shape[:-1], -1)), after, None)

  def _attend(
      self, q_BTHN: Array, k_BTJN: Array, v_BTJN: Array, segments: Segments,
      state: AttentionState | None,
  ) -> Array:
    """Attends to the rows' tokens and, given a state, to the cache."""
    number_BT = None
    if segments.resets_BT is not None:
      # Padding counts as part of the last document; causality hides it from all valid tokens.
      number_BT = jnp.cumsum(segments.resets_BT, axis=1, dtype=jnp.int32)
    if state is None:
      documents = None if number_BT is None else Documents(number_BT, number_BT)
      return self.attend(q_BTHN, k_BTJN, v_BTJN, documents, self.context)
    if number_BT is None:
      number_BT = jnp.zeros((1, q_BTHN.shape[1]), jnp.int32)
    first_B1 = segments.positions_BT[:, :1]
    slot_BC, held_BC = _in_order(first_B1, self.context)
    slot_BC = jnp.broadcast_to(slot_BC, state.k_BCJN.shape[:2])[..., None, None]
    k_BSJN, v_BSJN = (
        jnp.concatenate([jnp.take_along_axis(cache, slot_BC, axis=1), row], axis=1)
        for cache, row in ((state.k_BCJN, k_BTJN), (state.v_BCJN, v_BTJN))
    )
    # The cache belongs to the document that continues until the row's first reset.
    cache_BC = jnp.where(held_BC >= 0, 0, -1)
    batch = max(len(cache_BC), len(number_BT))
    keys_BS = jnp.concatenate(
        [jnp.broadcast_to(x, (batch, x.shape[1])) for x in (cache_BC, number_BT)], axis=1
    )
    return self.attend(q_BTHN, k_BSJN, v_BSJN, Documents(number_BT, keys_BS), self.context)

  def _attend_token(
      self, q_BHN: Array, k_BJN: Array, v_BJN: Array, position_B: Array,
      state: AttentionState | None,
  ) -> tuple[Array, AttentionState]:
    """Returns y_BHN of one token, and the cache with its key and value added."""
    assert state is not None
    rows, slot_B = jnp.arange(q_BHN.shape[0]), position_B % self.context
    k_BCJN = state.k_BCJN.at[rows, slot_B].set(k_BJN, unique_indices=True)
    v_BCJN = state.v_BCJN.at[rows, slot_B].set(v_BJN, unique_indices=True)
    # Slots fill in order; once all are full, all of them are in the window.
    held_BC = jnp.arange(self.context)[None] <= position_B[:, None]
    y_B1HN = jax.nn.dot_product_attention(
        q_BHN[:, None], k_BCJN, v_BCJN, mask=held_BC[:, None, None]
    )
    return y_B1HN[:, 0], AttentionState(k_BCJN, v_BCJN)

  def init_state(self, batch: int) -> AttentionState:
    """See `Mixer`."""
    shape = (batch, self.context, self.kv_heads, self.head_dim)
    return AttentionState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))


def _in_order(first_B1: Array, context: int) -> tuple[Array, Array]:
  """Returns the cache's slots from the oldest token to the newest, before the token at `first_B1`.

  Returns:
    Each slot's index, and the position of its token, [B, C]; below 0 means that it is empty.
  """
  held_BC = first_B1 - context + jnp.arange(context)[None]
  return held_BC % context, held_BC


def _held(last_B1: Array, context: int) -> Array:
  """Returns [B, C], each slot's position after the token at `last_B1`; below 0 means empty."""
  return last_B1 - (last_B1 - jnp.arange(context)[None]) % context


def _ring_after(
    before: AttentionState, row: AttentionState, segments: Segments, context: int
) -> AttentionState:
  """Computes the cache after the rows' last tokens that are not padding.

  Args:
    before: the cache before the rows' first tokens.
    row: the rows' own keys and values, [B, T, J, N].
    segments: the rows' documents.
    context: C.

  Returns:
    The cache. Slots for which the last document has no token are zero; a row of padding alone
    leaves its cache unchanged.
  """
  time = segments.positions_BT.shape[1]
  index_B1 = jnp.full((1, 1), time - 1, jnp.int32)
  if segments.valid_BT is not None:
    index_B1 = jnp.sum(segments.valid_BT, axis=1, keepdims=True, dtype=jnp.int32) - 1
  positions_BT = segments.positions_BT
  last_B1 = jnp.take_along_axis(positions_BT, jnp.maximum(index_B1, 0), axis=1)
  held_BC = _held(last_B1, context)
  # The index of each slot's token in the row; if negative, the slot holds that token already.
  source_BC = index_B1 - (last_B1 - held_BC)

  def ring(old: Array, new: Array) -> Array:
    def each(mask: Array) -> Array:
      return mask[..., None, None]

    batch = new.shape[0]
    taken = jnp.take_along_axis(
        new, each(jnp.broadcast_to(jnp.maximum(source_BC, 0), (batch, context))), axis=1
    )
    kept = jnp.where(each(source_BC >= 0), taken, old)
    ring = jnp.where(each(held_BC >= 0), kept, 0)
    return jnp.where(each(index_B1 < 0), old, ring)

  return jax.tree.map(ring, before, row)
