"""Sweep: how many shallow layers a layer reads (m), and which (`dense.reads`).

Command   dense-jax sweep experiments/sweeps/sources.py --workdir runs/sweeps/sources --jobs 2
Hardware  two CPU cores
Expected  experiments/results/evidence_sources.md
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

DEPTH, READS, INJECT = "model.dense.depth", "model.dense.reads", "model.dense.inject"


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` is a smoke test of it."""
  cells = [Cell("base", {DEPTH: 0})]
  for inject, depths in (("state", (1, 2, 3)), ("inputs", (3,))):
    for depth in depths:
      for reads in ("nearest", "first", "spread"):
        if reads != "spread" or depth == 3:  # Of up to two layers, spread reads the nearest.
          cells.append(
              Cell(f"{inject} m={depth} {reads}", {DEPTH: depth, READS: reads, INJECT: inject}))
    cells.append(Cell(f"{inject} m=7 all", {DEPTH: 7, INJECT: inject}))
  sweep = Sweep(
      "experiments/evidence.py", tuple(cells), "base", more_seeds=(3, 4),
      question="How many shallow layers, and which, should a layer read?",
  )
  return sweep.debug() if check_argument(arg, "debug") else sweep
