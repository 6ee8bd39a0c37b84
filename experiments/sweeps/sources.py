"""Sweep: how many shallow layers a layer reads (m), and which (`dense.reads`).

Command   dense-jax sweep experiments/sweeps/sources.py --workdir runs/sweeps/sources --jobs 2
Hardware  two CPU cores; `:350m` confirms it with mamba2 at 350M parameters, on a pod
          (docs/evidence.md has its cost and the command that launches it)
Expected  docs/evidence.md, experiments/results/evidence_sources.md
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

DEPTH, READS, INJECT = "model.dense.depth", "model.dense.reads", "model.dense.inject"


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` and `:350m-debug` are smoke tests of it."""
  size, _, debug = check_argument(arg, "debug", "350m", "350m-debug").partition("-")
  if size == "debug":
    size, debug = "", size
  sweep = Sweep(
      "experiments/family_350m.py:mamba2" if size else "experiments/evidence.py",
      tuple(_large() if size else _small()), "base", more_seeds=() if size else (3, 4),
      question="How many shallow layers, and which, should a layer read?",
  )
  return sweep.debug() if debug else sweep


def _small() -> list[Cell]:
  """Returns all answers, for a model of eight layers."""
  cells = [Cell("base", {DEPTH: 0})]
  for inject, depths in (("state", (1, 2, 3)), ("inputs", (3,))):
    for depth in depths:
      for reads in ("nearest", "first", "spread"):
        if reads != "spread" or depth == 3:  # Of up to two layers, spread reads the nearest.
          cells.append(
              Cell(f"{inject} m={depth} {reads}", {DEPTH: depth, READS: reads, INJECT: inject}))
    cells.append(Cell(f"{inject} m=7 all", {DEPTH: 7, INJECT: inject}))
  return cells


def _large() -> list[Cell]:
  """Returns those that are worth a pod."""
  return [
      Cell("base", {DEPTH: 0}),
      *(Cell(f"state m={depth}", {DEPTH: depth}) for depth in (1, 2)),
      Cell("inputs m=1", {DEPTH: 1, INJECT: "inputs"}),
  ]
