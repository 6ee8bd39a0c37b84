"""Sweep: dense S4D and S4 against S4D and S4.

Command   dense-jax sweep experiments/sweeps/lti.py --workdir runs/sweeps/lti --jobs 2
Hardware  two CPU cores
Expected  not run yet; docs/evidence.md has what was
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` is a smoke test of it."""
  cells = []
  for family in ("s4d", "s4"):
    shape = {"model.family": family, "model.mixer.state_size": 32, "model.layers": 6}
    cells.append(Cell(family, shape))
    for depth in (1, 2):
      cells.append(Cell(f"{family} m={depth}", shape | {"model.dense.depth": depth}, base=family))
  sweep = Sweep(
      "experiments/evidence.py", tuple(cells), "s4d", more_seeds=(3, 4),
      question="Do time-invariant models gain from dense connections?",
  )
  return sweep.debug() if check_argument(arg, "debug") else sweep
