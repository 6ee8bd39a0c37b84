"""Paired differences of a sweep's cells, and which of them are not decided."""

from dense_jax.statistics import Estimate
from dense_jax.sweeps.definition import Cell, Sweep
from dense_jax.sweeps.results import Results


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
