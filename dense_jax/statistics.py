"""Means of a few values, and how far they can be trusted."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtr


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean, over seeds for example.

  Attributes:
    mean: the mean; NaN without values, or if one is not finite.
    error: its standard error, s / sqrt(n); NaN with fewer than two values, or if one is not finite.
    count: n, the number of values.
  """

  mean: float
  error: float
  count: int

  @classmethod
  def of(cls, values: Sequence[float]) -> "Estimate":
    """Estimates the mean that values are drawn around."""
    count = len(values)
    if not all(map(math.isfinite, values)):
      return cls(math.nan, math.nan, count)
    mean = statistics.fmean(values) if count else math.nan
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return cls(mean, error, count)

  @property
  def decided(self) -> bool:
    """True if the mean is further than two standard errors from zero."""
    return abs(self.mean) > 2 * self.error

  @property
  def p_value(self) -> float:
    """The two-sided p-value of the mean being zero, by Student's t; NaN with fewer than two values.

    It takes the values as drawn from one normal distribution, and has n - 1 degrees of freedom.
    """
    if self.error == 0:  # All values are the same.
      return 0.0 if self.mean else 1.0
    return float(2 * stdtr(self.count - 1, -abs(self.mean) / self.error))
