"""Sweep: dense S4D and S4 against S4D and S4.

Command   dense-jax sweep experiments/sweeps/lti.py --workdir runs/sweeps/lti --jobs 2
Hardware  two CPU cores
Expected  s4 gains 0.03 to 0.04 nats, s4d nothing that is decided (docs/evidence.md)
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

# A state of each channel and step is held for the dense connection, so that steps are dear: half of
# the other sweeps' tokens.
SMALL = {"model.mixer.state_size": 16, "model.layers": 6, "train.steps": 1200}


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` is a smoke test of it."""
  debug = check_argument(arg, "debug")
  cells = []
  for family in ("s4d", "s4"):
    shape = {"model.family": family, **({"model.layers": 3} if debug else SMALL)}
    cells.append(Cell(family, shape))
    for depth in (1, 2):
      cells.append(Cell(f"{family} m={depth}", shape | {"model.dense.depth": depth}, base=family))
  sweep = Sweep(
      "experiments/evidence.py", tuple(cells), "s4d", more_seeds=(3, 4),
      question="Do time-invariant models gain from dense connections?",
  )
  return sweep.debug() if debug else sweep
