"""Sweep: the parts of a dense connection: transition, fusion, injection and gate.

Command   dense-jax sweep experiments/sweeps/parts.py --workdir runs/sweeps/parts --jobs 2
Hardware  two CPU cores
Expected  gau_retnet gains most without a gate, mamba2 by nothing (docs/evidence.md)
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

FAMILIES: dict[str, dict[str, int]] = {
    "gau_retnet": {},
    "mamba2": {"model.mixer.state_size": 32, "model.mixer.head_dim": 32},
}
# The cells are many, so that they are small: six layers, half of the others' tokens.
SMALL = {"model.layers": 6, "train.steps": 1200}
# Name -> what differs from m = 2 with the defaults.
PARTS: dict[str, dict[str, int | str]] = {
    "state": {},
    "linear": {"transition": "linear"},
    "gate channel_state": {"gate": "channel_state"},
    "gate none": {"gate": "none"},
    "gate per source": {"gate_sharing": "per_source"},
    "gate normal": {"gate_init": "normal"},
    "concat": {"fusion": "concat"},
    "gated": {"fusion": "gated"},
    "attention": {"fusion": "attention"},
    "inputs": {"inject": "inputs"},
    "inputs normal": {"inject": "inputs", "gate_init": "normal"},
    "inputs without norm": {"inject": "inputs", "input_norm": False},
}
# What `:open` has in place of these, at the other sweeps' size.
OPEN: dict[str, dict[str, int | str]] = {
    "m=2": {},
    "m=1 no gate": {"depth": 1, "gate": "none"},
    "m=2 no gate": {"gate": "none"},
    "m=7 no gate": {"depth": 7, "gate": "none"},
}


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:open` is connections without a gate, in larger models that train longer.

  `:debug` and `:open-debug` are smoke tests.
  """
  names = check_argument(arg, "debug", "open", "open-debug").split("-")
  debug, large = "debug" in names, "open" in names
  cells = []
  for family, options in FAMILIES.items():
    shape = {"model.family": family, **({} if debug or large else SMALL), **options}
    cells.append(Cell(family, shape))
    for name, part in (OPEN if large else PARTS).items():
      dense = {f"model.dense.{key}": value for key, value in ({"depth": 2} | part).items()}
      cells.append(Cell(f"{family} {name}", shape | dense, base=family))
  question = ("Do connections without a gate gain, at the other sweeps' size?" if large else
              "Which transition, fusion, injection and gate of a dense connection help?")
  sweep = Sweep(
      "experiments/evidence.py", tuple(cells), "gau_retnet", more_seeds=(3, 4), question=question,
  )
  return sweep.debug() if debug else sweep
