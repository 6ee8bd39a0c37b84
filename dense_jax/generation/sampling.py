"""Draws the next token from logits, for rows that each have settings of their own.

One compiled program serves all settings, because they are arrays. What a row draws depends on
its own logits, settings and key alone.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.config import invalid
from dense_jax.types import Array

# Below the first temperature, float32 draws are greedy anyway; above the second, they are uniform.
# The reciprocal of the second, by which compilers multiply, is still a normal float32 number.
_LEAST_TEMPERATURE, _GREATEST_TEMPERATURE = 1e-6, 1e37
# A sum of probabilities that is p up to the rounding of float32 counts as p.
_ROUNDING = 2.0**-22
# The likeliest tokens that are looked at first. Sorting a whole vocabulary takes longer than a
# small model's step, and is left to rows that keep more tokens than these.
_FEW = 128
_ALL = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The distribution that tokens are drawn from.

  Logits are changed in this order: repetition penalty, temperature, then the tokens that all of
  top-k, top-p and min-p keep.

  Attributes:
    temperature: divides the logits; 0 means greedy.
    top_k: keeps only the k likeliest tokens; 0 means all. Ties go to the lowest ids.
    top_p: keeps only the smallest set of likeliest tokens whose probabilities sum to at least p,
      computed at `temperature` among the tokens that `top_k` keeps; 1 means all. Ties go to the
      lowest ids (arXiv 1904.09751).
    min_p: keeps only tokens of at least this fraction of the likeliest one's probability, at
      `temperature`; 0 means all (arXiv 2407.01082).
    repetition_penalty: divides the positive logits, and multiplies the negative ones, of all
      tokens that prompt and continuation hold so far; 1 means none (arXiv 1909.05858, section 4.1).

  Raises:
    InputError: a value is out of range.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self) -> None:
    if not 0 <= self.temperature < math.inf:
      raise invalid("temperature", self.temperature, "a finite number >= 0 (0 is greedy)")
    if self.top_k < 0:
      raise invalid("top_k", self.top_k, "an integer >= 0 (0 is all)")
    if not 0 < self.top_p <= 1:
      raise invalid("top_p", self.top_p, "a number > 0 and <= 1")
    if not 0 <= self.min_p <= 1:
      raise invalid("min_p", self.min_p, "a number >= 0 and <= 1 (0 is all)")
    if not 1e-3 <= self.repetition_penalty <= 1e3:
      raise invalid(
          "repetition_penalty", self.repetition_penalty, "a number >= 0.001 and <= 1000 (1 is none)"
      )


PLAIN = Sampling()
"""The model's own distribution."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
  """The rows' samplings as arrays.

  Attributes:
    temperature_B: float32; 0 means greedy.
    top_k_B: int32, at least 1.
    reach_B: float32, the fraction of all probability that top-p has to reach; infinity means all.
    min_p_B, penalty_B: float32.
  """

  temperature_B: Array
  top_k_B: Array
  reach_B: Array
  min_p_B: Array
  penalty_B: Array

  @classmethod
  def of(cls, samplings: Sequence[Sampling]) -> "Settings":
    """Returns the settings of rows with these samplings."""

    def temperature(value: float) -> float:
      return value and min(max(value, _LEAST_TEMPERATURE), _GREATEST_TEMPERATURE)

    def row(values: Sequence[float], dtype: type) -> Array:
      return jnp.asarray(np.asarray(values, dtype))

    return cls(
        row([temperature(each.temperature) for each in samplings], np.float32),
        row([min(each.top_k or _ALL, _ALL) for each in samplings], np.int32),
        row([
            each.top_p * (1 - _ROUNDING) if each.top_p < 1 else math.inf for each in samplings
        ], np.float32),
        row([each.min_p for each in samplings], np.float32),
        row([each.repetition_penalty for each in samplings], np.float32),
    )


def penalized(logits_BV: Array, seen_BV: Array, settings: Settings) -> Array:
  """Returns the logits with the repetition penalty of the tokens that `seen_BV` marks."""
  penalty_B1 = settings.penalty_B[:, None]
  repeated_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  return jnp.where(seen_BV, repeated_BV, logits_BV)


def sample(logits_BV: Array, keys_B: Array, settings: Settings) -> Array:
  """Draws token ids, int32 [B], from float32 logits; a token with logit -inf is never drawn.

  The noise belongs to token ids (Gumbel-max), so logits that differ by rounding nearly always draw
  the same token.
  """
  # -0 and 0 are equally likely, but a sort tells them apart.
  logits_BV = jnp.where(logits_BV == 0, 0.0, logits_BV)
  greedy_B = jnp.argmax(logits_BV, axis=-1)
  vocabulary = logits_BV.shape[1]
  draws_B = settings.temperature_B > 0
  restricts_B = draws_B & (
      (settings.top_k_B < vocabulary) | jnp.isfinite(settings.reach_B) | (settings.min_p_B > 0)
  )

  # Each branch gives a row that could do without it what the other would give it.
  def draw() -> Array:
    kept_BV = jax.lax.cond(
        jnp.any(restricts_B), lambda: _kept(logits_BV, settings),
        lambda: jnp.ones(logits_BV.shape, bool),
    )
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,)))(keys_B)
    scaled_BV = _scaled(logits_BV, settings)
    return jnp.argmax(jnp.where(kept_BV, scaled_BV, -jnp.inf) + noise_BV, axis=-1)

  drawn_B = jax.lax.cond(jnp.any(draws_B), draw, lambda: greedy_B)
  return jnp.where(draws_B, drawn_B, greedy_B).astype(jnp.int32)


def _scaled(logits_BV: Array, settings: Settings) -> Array:
  """Returns (logits - their maximum) / temperature, so that none can overflow."""
  below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  return below_BV / jnp.where(settings.temperature_B > 0, settings.temperature_B, 1)[:, None]


def _kept(logits_BV: Array, settings: Settings) -> Array:
  """Returns bool [B, V], true for the tokens that top-k, top-p and min-p all keep."""
  few_BV, _ = jax.lax.top_k(logits_BV, min(_FEW, logits_BV.shape[1]))
  sums_B = jnp.sum(jnp.exp(_scaled(logits_BV, settings)), axis=-1)
  size_B, least_B, is_known_B = _cut(few_BV, sums_B, logits_BV.shape[1], settings)

  def of_all() -> tuple[Array, Array]:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    all_size_B, all_least_B, _ = _cut(sorted_BV, sums_B, logits_BV.shape[1], settings)
    return (
        jnp.where(is_known_B, size_B, all_size_B), jnp.where(is_known_B, least_B, all_least_B)
    )

  size_B, least_B = jax.lax.cond(jnp.all(is_known_B), lambda: (size_B, least_B), of_all)
  # Of the tokens that are as likely as the least likely kept one, take the first that fit.
  likelier_BV, equal_BV = logits_BV > least_B[:, None], logits_BV == least_B[:, None]
  room_B = size_B - jnp.sum(likelier_BV, axis=-1)
  return likelier_BV | jax.lax.cond(
      jnp.any(jnp.sum(equal_BV, axis=-1) > room_B),
      lambda: equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= room_B[:, None]),
      lambda: equal_BV,
  )


def _cut(
    sorted_BK: Array, sums_B: Array, vocabulary: int, settings: Settings
) -> tuple[Array, Array, Array]:
  """Finds how many of the likeliest tokens are kept.

  Args:
    sorted_BK: the K largest logits, in descending order.
    sums_B: the sums over all tokens of exp((logit - largest) / temperature).
    vocabulary: V.
    settings: the rows' settings.

  Returns:
    The number of kept tokens, the least of their logits, and whether K logits were enough to tell.
  """
  count = sorted_BK.shape[1]
  weight_BK = jnp.exp(_scaled(sorted_BK, settings))
  weight_BK = jnp.where(jnp.arange(count)[None] < settings.top_k_B[:, None], weight_BK, 0)
  sum_BK = jnp.cumsum(weight_BK, axis=-1)
  has_all_B = (settings.top_k_B < vocabulary) | (count == vocabulary)
  sums_B = jnp.where(has_all_B, sum_BK[:, -1], sums_B)
  # A token belongs to the set if those before it do not reach p; the first always does.
  short_BK = sum_BK < (settings.reach_B * sums_B)[:, None]
  nucleus_B = 1 + jnp.sum(short_BK[:, :-1], axis=-1)
  likely_B = jnp.sum(weight_BK >= settings.min_p_B[:, None], axis=-1)
  size_B = jnp.minimum(jnp.minimum(nucleus_B, likely_B), settings.top_k_B)
  least_B = jnp.take_along_axis(sorted_BK, size_B[:, None] - 1, axis=-1)[:, 0]
  is_known_B = (settings.top_k_B <= count) | (
      (settings.top_k_B >= vocabulary) & (size_B < count)
  )
  return size_B, least_B, is_known_B | (count == vocabulary)
