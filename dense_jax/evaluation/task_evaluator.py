"""Scores on tasks while a run trains."""

from collections.abc import Mapping

from dense_jax.config import EvalConfig, invalid
from dense_jax.evaluation.evaluators import Evaluator, Snapshot
from dense_jax.evaluation.likelihood import Likelihood
from dense_jax.evaluation.scoring import evaluate_task
from dense_jax.evaluation.task_data import load_task
from dense_jax.evaluation.tasks import parse_names


class TaskScores(Evaluator):
  """The metrics of the tasks that `config.eval` names, such as `tasks_lambada_acc`."""

  name = "tasks"

  def __init__(self, config: EvalConfig) -> None:
    """Reads the tasks' files.

    Raises:
      InputError: a task is unknown, or a file is missing or malformed.
    """
    names = parse_names(config.tasks, "config.eval.tasks")
    if not config.data:
      raise invalid("config.eval.data", config.data, "a folder that has the tasks' files")
    self.every = config.every
    self._data = [
        load_task(name, config.data, field="config.eval.data", limit=config.items)
        for name in names
    ]

  def evaluate(self, snapshot: Snapshot) -> dict[str, float]:
    """Computes the metrics of all tasks, named `<task>_<metric>`."""
    likelihood = Likelihood(
        snapshot.model, snapshot.params, snapshot.data.tokenizer,
        window=snapshot.config.data.seq_len, batch_size=snapshot.config.train.batch_size,
        put=snapshot.put, rows=snapshot.rows,
    )
    numbers: dict[str, float] = {}
    for data in self._data:
      metrics = evaluate_task(likelihood, data).metrics
      numbers |= {f"{data.task}_{name}": value for name, value in metrics.values.items()}
    return numbers

  def describe(self, numbers: Mapping[str, float], snapshot: Snapshot) -> str:
    """Returns the first metric of each task."""
    del snapshot
    first: dict[str, float] = {}
    for data in self._data:
      name = next(name for name in numbers if name.startswith(data.task + "_"))
      first[name.removeprefix(data.task + "_") + " " + data.task] = numbers[name]
    return "tasks: " + ", ".join(f"{name} {value:.4g}" for name, value in first.items())
