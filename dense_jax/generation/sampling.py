"""Draws the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from dense_jax.config import invalid
from dense_jax.types import Array

# Below the first temperature, float32 draws are greedy anyway; above the second, they are uniform.
# The reciprocal of the second, by which compilers multiply, is still a normal float32 number.
_LEAST_TEMPERATURE, _GREATEST_TEMPERATURE = 1e-6, 1e37
# A sum of probabilities that is p up to the rounding of float32 counts as p.
_ROUNDING = 2.0**-22


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The distribution that tokens are drawn from, by temperature, top-k and top-p.

  Attributes:
    temperature: divides the logits; 0 means greedy.
    top_k: keeps only the k likeliest tokens; 0 means all. Ties go to the lowest ids.
    top_p: keeps only the smallest set of likeliest tokens whose probabilities sum to at least p,
      computed at `temperature` among the tokens that `top_k` keeps; 1 means all. Ties go to the
      lowest ids.

  Raises:
    InputError: a value is out of range.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self) -> None:
    if not 0 <= self.temperature < float("inf"):
      raise invalid("temperature", self.temperature, "a finite number >= 0 (0 is greedy)")
    if self.top_k < 0:
      raise invalid("top_k", self.top_k, "an integer >= 0 (0 is all)")
    if not 0 < self.top_p <= 1:
      raise invalid("top_p", self.top_p, "a number > 0 and <= 1")


def sample(logits_BV: Array, key: Array, sampling: Sampling) -> Array:
  """Draws token ids, int32 [B], from float32 logits; a token with logit -inf is never drawn."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  # -0 and 0 are equally likely, but a sort tells them apart.
  logits_BV = jnp.where(logits_BV == 0, 0.0, logits_BV)
  tokens_BV = None
  if 0 < sampling.top_k < logits_BV.shape[-1]:
    logits_BV, tokens_BV = jax.lax.top_k(logits_BV, sampling.top_k)  # Equal ones by index.
  scaled_BV = _scaled(logits_BV, sampling.temperature)
  if sampling.top_p < 1:
    scaled_BV = jnp.where(_nucleus(logits_BV, sampling), scaled_BV, -jnp.inf)
  drawn_B = jax.random.categorical(key, scaled_BV)
  if tokens_BV is not None:
    drawn_B = jnp.take_along_axis(tokens_BV, drawn_B[:, None], axis=-1)[:, 0]
  return drawn_B.astype(jnp.int32)


def _scaled(logits_BV: Array, temperature: float) -> Array:
  """Returns (logits - their maximum) / temperature, so that none can overflow."""
  below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  return below_BV / min(max(temperature, _LEAST_TEMPERATURE), _GREATEST_TEMPERATURE)


def _nucleus(logits_BV: Array, sampling: Sampling) -> Array:
  """Returns bool [B, V], true for the smallest set of likeliest tokens that reaches `top_p`."""
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  sum_BV = jnp.cumsum(jnp.exp(_scaled(sorted_BV, sampling.temperature)), axis=-1)
  # A token belongs to the set if those before it do not reach p; the first always does.
  short_BV = sum_BV < sampling.top_p * (1 - _ROUNDING) * sum_BV[:, -1:]
  size_B1 = 1 + jnp.sum(short_BV[:, :-1], axis=-1, keepdims=True)
  least_B1 = jnp.take_along_axis(sorted_BV, size_B1 - 1, axis=-1)
  # Of the tokens that are as likely as the least likely one of the set, take the first that fit.
  likelier_BV, equal_BV = logits_BV > least_B1, logits_BV == least_B1
  room_B1 = size_B1 - jnp.sum(likelier_BV, axis=-1, keepdims=True)
  return likelier_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= room_B1))
