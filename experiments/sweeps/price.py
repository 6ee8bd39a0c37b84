"""Sweep: what the cost of dense connections buys if a base model gets it instead.

Command   dense-jax sweep experiments/sweeps/price.py --workdir runs/sweeps/price --jobs 2
Hardware  two CPU cores
Expected  a base that trains for the time of m = 2 is 0.24 nats better (docs/evidence.md)
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Match, Sweep

DENSE = "m=2"


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` is a smoke test of it."""
  base = {"model.dense.depth": 0}
  cells = (
      Cell(DENSE, {"model.dense.depth": 2}),
      Cell("base", base),
      Cell("base, parameters of m=2", base, match=Match("parameters", DENSE)),
      Cell("base, FLOPs of m=2", base, match=Match("flops", DENSE)),
      Cell("base, time of m=2", base, match=Match("time", DENSE)),
      Cell("m=2, time of base", {"model.dense.depth": 2}, match=Match("time", "base")),
  )
  sweep = Sweep(
      "experiments/evidence.py", cells, DENSE, more_seeds=(3, 4),
      question="Is a dense connection worth its price: tokens, parameters, FLOPs or time?",
  )
  return sweep.debug() if check_argument(arg, "debug") else sweep
