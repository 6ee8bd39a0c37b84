"""Sweep: dense connections on a synthetic task, in every kind of model; the argument is the task.

Command   dense-jax sweep experiments/sweeps/recall.py:mqar --workdir runs/sweeps/mqar --jobs 2
Hardware  two CPU cores
Expected  docs/long_range.md
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

# Family -> its options, for about as many parameters as gau_retnet has.
SHAPES: dict[str, dict[str, object]] = {
    "gau_retnet": {},
    "retnet": {"model.layers": 3, "model.mixer.heads": 2},
    "mamba": {},
    "mamba2": {"model.mixer.state_size": 32, "model.mixer.head_dim": 32},
}
# With one head and a third of the rate it learned mqar with every seed that was tried.
ATTENTION = {"model.family": "transformer", "model.layers": 3, "model.mixer.heads": 1,
             "optimizer.learning_rate": 1e-3}
TASKS = ("mqar", "copying", "induction", "passkey", "listops", "parity", "dyck")
# Where nearly all learn the length of training, four times it tells them apart.
LONGER = {"mqar": "task_accuracy_96", "induction": "task_accuracy_256",
          "passkey": "task_accuracy_256"}


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep of a task, mqar if none is named; `:debug` is a smoke test of it.

  Several words are joined by a hyphen: `:passkey-debug`.
  """
  names = ["debug", *TASKS, *(f"{name}-debug" for name in TASKS)]
  words = check_argument(arg, *names).split("-")
  task = words[0] if words[0] in TASKS else "mqar"
  cells = [Cell("transformer", ATTENTION)]
  for family, options in SHAPES.items():
    shape = {"model.family": family, **options}
    cells += [
        Cell(family, shape),
        Cell(f"{family} m=2", shape | {"model.dense.depth": 2}, base=family),
    ]
  sweep = Sweep(
      f"experiments/recall.py:{task}", tuple(cells), "gau_retnet", more_seeds=(3, 4),
      metric="task_accuracy" if "debug" in words else LONGER.get(task, "task_accuracy"),
      higher_is_better=True,
      question=f"Do dense connections help to learn {task}?",
  )
  return sweep.debug() if "debug" in words else sweep
