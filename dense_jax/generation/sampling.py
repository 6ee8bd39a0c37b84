"""Choosing the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from dense_jax.config import invalid
from dense_jax.types import Array

# Below it, float32 draws are greedy anyway.
_LEAST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn.

  Attributes:
    temperature: logits are divided by it; 0 is greedy.
    top_k: only the k likeliest tokens; 0 is all.
    top_p: only the smallest set of likeliest tokens whose probability reaches p.
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
  """Token ids, int32 [B], from float32 logits."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  # From the likeliest down, so that no temperature can overflow.
  logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  logits_BV = logits_BV / max(sampling.temperature, _LEAST_TEMPERATURE)
  vocab = logits_BV.shape[-1]
  if 0 < sampling.top_k < vocab:
    kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays if those before it have not reached p: the first always does.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    last_B1 = jnp.sum(before_BV < sampling.top_p, axis=-1, keepdims=True) - 1
    least_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return jax.random.categorical(key, logits_BV).astype(jnp.int32)
