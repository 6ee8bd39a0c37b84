"""Sweep: models of 4 to 24 layers with equally many parameters, dense against base.

Command   dense-jax sweep experiments/sweeps/depth.py --workdir runs/sweeps/depth --jobs 2
Hardware  two CPU cores
Expected  m = 2 gains 0.04 nats at 16 layers; fewer layers are better still (docs/evidence.md)
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Match, Sweep


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` is a smoke test of it."""
  cells = [Cell("8 layers", {"model.layers": 8})]
  for layers in (4, 16, 24):
    cells.append(Cell(f"{layers} layers", {"model.layers": layers},
                      match=Match("parameters", "8 layers")))
  cells += [
      Cell(f"{layers} layers, m=2", {"model.layers": layers, "model.dense.depth": 2},
           base=f"{layers} layers", match=Match("parameters", "8 layers"))
      for layers in (4, 8, 16, 24)
  ]
  sweep = Sweep(
      "experiments/evidence.py", tuple(cells), "8 layers", more_seeds=(3, 4),
      question="Do dense connections gain more in deeper models?",
  )
  return sweep.debug() if check_argument(arg, "debug") else sweep
