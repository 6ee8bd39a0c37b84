"""Log decays summed inside chunks so that differences of the sums stay accurate.

The decay from token s to token t of a chunk is exp(A_t - A_s), where A_t sums the log decays up
to and including token t. The rounding error of a float32 sum grows with the sum. After a few
tokens that nearly clear the state (a Mamba-2 layer's large dt), A is in the hundreds, and the
decays between the tokens that follow, which may be near 1, would have three correct digits.

So each log decay is split into a multiple of a power of two and a remainder. Sums of the
multiples are exact, and sums of the remainders are small. The two differences, added, are as
accurate as the sum of the log decays between the two tokens. This costs a second running sum and
one more addition per exponent. The alternative, sums by sub-blocks of a chunk, would still round
inside a sub-block, and needs one case for tokens of the same sub-block and one for others.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import split_time
from dense_jax.types import Array

# exp of this is zero in float32, so smaller log decays (even -inf) are replaced by it.
FLOOR = -104.0
_SIGNIFICAND_BITS = 24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogDecay:
  """Summed log decays, as the sum of two float32 arrays of one shape.

  Attributes:
    high: multiples of a power of two, summed without rounding errors; it has no gradient.
    low: the remainders, summed.
  """

  high: Array
  low: Array

  def __getitem__(self, index: Any) -> Self:
    """Indexes both arrays."""
    return type(self)(self.high[index], self.low[index])

  def since(self, earlier: Self) -> Array:
    """Returns this sum minus an earlier one, float32; the axes of the two broadcast."""
    return (self.high - earlier.high) + (self.low - earlier.low)

  def total(self) -> Array:
    """Returns the sum as one float32 array."""
    return self.high + self.low


def weight(mask: Array | None, log_weight: Array) -> Array:
  """exp(log_weight) where `mask` is true, else 0, without overflow or gradient there."""
  return jnp.exp(log_weight if mask is None else jnp.where(mask, log_weight, -jnp.inf))


def summed_log_decay(log_decay_BTH: Array, chunk: int) -> LogDecay:
  """Sums log decays within each chunk.

  Args:
    log_decay_BTH: <= 0; values at or below FLOOR count as FLOOR and have no gradient.
    chunk: C, tokens per chunk.

  Returns:
    Sums [B, G, C, H] up to and including each token; padding counts as zeros.
  """
  log_decay_BGCH = split_time(log_decay_BTH.astype(jnp.float32), chunk)
  log_decay_BGCH = jnp.where(log_decay_BGCH <= FLOOR, FLOOR, log_decay_BGCH)
  # The finest unit of which float32 still represents the largest sum exactly.
  unit = 2.0 ** (math.ceil(math.log2(-FLOOR * chunk)) - _SIGNIFICAND_BITS)
  high_BGCH = jax.lax.stop_gradient(jnp.round(log_decay_BGCH / unit) * unit)
  low_BGCH = log_decay_BGCH - high_BGCH
  return LogDecay(jnp.cumsum(high_BGCH, axis=2), jnp.cumsum(low_BGCH, axis=2))
