"""Means, standard errors and paired differences of a sweep's cells."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtr

from dense_jax.sweeps.definition import Cell, Sweep
from dense_jax.sweeps.results import Results


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds.

  Attributes:
    mean: the mean; NaN without seeds.
    error: its standard error, s / sqrt(n); NaN with fewer than two seeds.
    count: n, the number of seeds.
  """

  mean: float
  error: float
  count: int

  @classmethod
  def of(cls, values: Sequence[float]) -> "Estimate":
    """Estimates the mean that values are drawn around."""
    count = len(values)
    mean = statistics.fmean(values) if count else math.nan
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return cls(mean, error, count)

  @property
  def decided(self) -> bool:
    """True if the mean is further than two standard errors from zero."""
    return abs(self.mean) > 2 * self.error

  @property
  def p_value(self) -> float:
    """The two-sided p-value of the mean being zero, by Student's t; NaN with fewer than two seeds.

    It takes the values as drawn from one normal distribution, and has n - 1 degrees of freedom.
    """
    if self.error == 0:  # All values are the same.
      return 0.0 if self.mean else 1.0
    return float(2 * stdtr(self.count - 1, -abs(self.mean) / self.error))


def difference(sweep: Sweep, results: Results, cell: Cell) -> Estimate:
  """Estimates a cell's metric less its base's, from the seeds that both have.

  A seed gives both runs the same order of the data, so that the differences of single seeds vary
  less than the runs do.
  """
  own, base = results.values(cell.name), results.values(sweep.base_of(cell).name)
  return Estimate.of([own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())])


def undecided(sweep: Sweep, results: Results) -> set[str]:
  """Returns the names of the cells whose difference to their base is not decided."""
  return {
      cell.name for cell in sweep.cells
      if cell.name != sweep.base_of(cell).name
      and not difference(sweep, results, cell).decided
  }
