"""Sweep: dense connections in every family of selective and matrix states, beside a transformer.

Command   dense-jax sweep experiments/sweeps/families.py --workdir runs/sweeps/families --jobs 2
Hardware  two CPU cores
Expected  no family gains more than 0.03 nats; docs/evidence.md
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

# Family -> its options, for about as many parameters as gau_retnet has.
SHAPES: dict[str, dict[str, int]] = {
    "gau_retnet": {},
    "retnet": {"model.layers": 5},
    "mamba": {"model.mixer.state_size": 8},
    "mamba2": {"model.mixer.state_size": 32, "model.mixer.head_dim": 32},
}
# It has no dense connections. Its rate is the best of 5e-4 to 1e-2, tried with one seed.
TRANSFORMER = {"model.family": "transformer", "model.layers": 4, "optimizer.learning_rate": 2e-3}


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` is a smoke test of it."""
  cells = [Cell("transformer", TRANSFORMER)]
  for family, options in SHAPES.items():
    shape = {"model.family": family, **options}
    cells += [
        Cell(family, shape),
        Cell(f"{family} state m=2", shape | {"model.dense.depth": 2}, base=family),
        Cell(f"{family} inputs m=2",
             shape | {"model.dense.depth": 2, "model.dense.inject": "inputs"}, base=family),
    ]
  sweep = Sweep(
      "experiments/evidence.py", tuple(cells), "gau_retnet", more_seeds=(3, 4),
      question="Which architectures gain from dense connections?",
  )
  return sweep.debug() if check_argument(arg, "debug") else sweep
