"""Log decays summed inside chunks, such that differences of the sums keep their digits.

The decay from token s to token t of a chunk is exp(A_t - A_s), where A sums log decays up to
and including a token. A float32 sum is rounded to its own size: behind a few tokens that nearly
clear the state (a Mamba-2 layer's large dt) A is in the hundreds, and the decays between the
tokens that follow, which may be near 1, would be known to three digits.

So each log decay is split into a multiple of a power of two and the rest. Sums of the multiples
are exact, and sums of the rests are small: a difference of each, added up, is as good as the sum
of the log decays between the two tokens. This costs a second running sum and one more addition
an exponent. Sums by sub-blocks of a chunk would keep rounding inside a sub-block, and
need a case each for tokens of the same sub-block and of different ones.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import split_time
from dense_jax.types import Array

# exp of this is zero in float32, so that smaller log decays (-inf too) can count as this one.
FLOOR = -104.0
_SIGNIFICAND_BITS = 24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogDecay:
  """Summed log decays, as the sum of two float32 arrays of one shape.

  Attributes:
    high: a multiple of a power of two, without rounding errors; it has no gradient.
    low: the rest.
  """

  high: Array
  low: Array

  def __getitem__(self, index: Any) -> Self:
    """The same part of both arrays."""
    return type(self)(self.high[index], self.low[index])

  def since(self, earlier: Self) -> Array:
    """This sum less an earlier one, of which the axes may broadcast."""
    return (self.high - earlier.high) + (self.low - earlier.low)

  def total(self) -> Array:
    """The sum itself."""
    return self.high + self.low


def summed_log_decay(log_decay_BTH: Array, chunk: int) -> LogDecay:
  """Sums log decays within each chunk.

  Args:
    log_decay_BTH: <= 0; its gradient is zero from FLOOR down.
    chunk: C, tokens a chunk.

  Returns:
    Sums [B, G, C, H] up to and including each token; padding counts as zeros.
  """
  log_decay_BGCH = split_time(log_decay_BTH.astype(jnp.float32), chunk)
  log_decay_BGCH = jnp.where(log_decay_BGCH <= FLOOR, FLOOR, log_decay_BGCH)
  # The finest unit of which the largest sum is still a multiple that float32 can hold.
  unit = 2.0 ** (math.ceil(math.log2(-FLOOR * chunk)) - _SIGNIFICAND_BITS)
  high_BGCH = jax.lax.stop_gradient(jnp.round(log_decay_BGCH / unit) * unit)
  low_BGCH = log_decay_BGCH - high_BGCH
  return LogDecay(jnp.cumsum(high_BGCH, axis=2), jnp.cumsum(low_BGCH, axis=2))
