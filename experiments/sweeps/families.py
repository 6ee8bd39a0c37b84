"""Sweep: dense connections in every family of selective and matrix states, beside a transformer.

Command   dense-jax sweep experiments/sweeps/families.py --workdir runs/sweeps/families --jobs 2
Hardware  two CPU cores
Expected  with the default gate no family gains more than 0.03 nats (docs/evidence.md)
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

# Family -> its options, for about as many parameters as gau_retnet has.
SHAPES: dict[str, dict[str, int | float]] = {
    "gau_retnet": {},
    "retnet": {"model.layers": 5},
    "mamba": {"model.mixer.state_size": 8},
    "mamba2": {"model.mixer.state_size": 32, "model.mixer.head_dim": 32},
}
# It has no dense connections. Its rate is the best of 5e-4 to 1e-2, tried with one seed.
TRANSFORMER = {"model.family": "transformer", "model.layers": 4, "optimizer.learning_rate": 2e-3}

# Name -> what differs from m = 2 with the defaults.
CONNECTIONS = {"state m=2": {}, "inputs m=2": {"model.dense.inject": "inputs"}}
STATES = {"state m=2 no gate": {"model.dense.gate": "none"}}

# The rate of the others is 1e-2, at which three of fourteen dense selective runs became unstable.
SELECTIVE, LOWER_RATE = ("mamba", "mamba2"), {"optimizer.learning_rate": 5e-3}

# Of three quarters of the layers and half of the tokens, as the sweep of parts has them. In so few
# steps mamba learns nothing at 1e-2; 3e-3 was better than 1e-3, tried with one seed for 250 steps.
SHORT = {"gau_retnet": 6, "retnet": 4, "mamba": 6, "mamba2": 6, "transformer": 3}
SHORT_RATES = {"mamba": {"optimizer.learning_rate": 3e-3}}


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:slower` is the selective families at a lower learning rate.

  `:short` is all families by states without a gate, smaller and for half of the tokens: whether the
  best connection of the sweep of parts is good elsewhere, and models to look into past the length
  of training. `:debug`, `:slower-debug` and `:short-debug` are smoke tests.
  """
  names = check_argument(
      arg, "debug", *(f"{name}{end}" for name in ("slower", "short") for end in ("", "-debug"))
  ).split("-")
  slower, short = "slower" in names, "short" in names

  def options(family: str) -> dict[str, int | float]:
    if short:
      return {"model.layers": SHORT[family], "train.steps": 1200} | SHORT_RATES.get(family, {})
    return LOWER_RATE if slower else {}

  cells = [] if slower else [Cell("transformer", TRANSFORMER | options("transformer"))]
  for family in SELECTIVE if slower else SHAPES:
    shape = {"model.family": family, **SHAPES[family], **options(family)}
    cells.append(Cell(family, shape))
    cells += [
        Cell(f"{family} {name}", shape | {"model.dense.depth": 2} | connection, base=family)
        for name, connection in (STATES if short else CONNECTIONS).items()
    ]
  sweep = Sweep(
      "experiments/evidence.py", tuple(cells), "mamba" if slower else "gau_retnet",
      more_seeds=(3, 4), question="Which architectures gain from dense connections?",
  )
  return sweep.debug() if "debug" in names else sweep
