"""Sweep: dense connections that are open from the start, against those whose gate begins at zero.

Command   dense-jax sweep experiments/sweeps/gate.py --workdir runs/sweeps/gate --jobs 2
Hardware  two CPU cores
Expected  docs/evidence.md
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

FAMILIES: dict[str, dict[str, int]] = {
    "gau_retnet": {},
    "mamba2": {"model.mixer.state_size": 32, "model.mixer.head_dim": 32},
}
# Name -> the connection, by states of the nearest layers.
CONNECTIONS: dict[str, dict[str, int | str]] = {
    "m=2": {"model.dense.depth": 2},
    "m=1 no gate": {"model.dense.depth": 1, "model.dense.gate": "none"},
    "m=2 no gate": {"model.dense.depth": 2, "model.dense.gate": "none"},
    "m=7 no gate": {"model.dense.depth": 7, "model.dense.gate": "none"},
}


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` is a smoke test of it."""
  debug = check_argument(arg, "debug")
  cells = []
  for family, options in FAMILIES.items():
    shape = {"model.family": family, **options}
    cells.append(Cell(family, shape))
    cells += [
        Cell(f"{family} {name}", shape | connection, base=family)
        for name, connection in CONNECTIONS.items()
    ]
  sweep = Sweep(
      "experiments/evidence.py", tuple(cells), "gau_retnet", more_seeds=(3, 4),
      question="Do connections gain that are open from the start, at the other sweeps' size?",
  )
  return sweep.debug() if debug else sweep
