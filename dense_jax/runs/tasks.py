"""Scores a loaded model on tasks from local files."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dense_jax.config import defaults
from dense_jax.evaluation.likelihood import Likelihood
from dense_jax.evaluation.perplexity import fixed
from dense_jax.evaluation.scoring import Partial, TaskScore, evaluate_task, item_lines
from dense_jax.evaluation.task_data import TaskData, load_task
from dense_jax.evaluation.tasks import DEFINITIONS, TASKS, parse_names
from dense_jax.formatting import table
from dense_jax.runs.restoring import LoadedModel, Run

# The harness's, for models whose configuration does not say how many tokens they read.
_WINDOW = 2048
NAMES = tuple(TASKS)


def window_of(model: LoadedModel) -> int:
  """Returns the tokens that a model reads at most when no state is carried.

  These are the length of the rows that a run was trained on; or else the tokens that attention
  sees; or else 2,048, which is what lm-evaluation-harness takes.
  """
  if isinstance(model, Run):
    return model.config.data.seq_len
  return getattr(model.model.config.mixer, "context", _WINDOW)


def digests(model: LoadedModel) -> dict[str, str]:
  """Returns SHA-256 of the model's configuration, of its parameters and of its tokenizer."""
  config = json.dumps(defaults(model.model.config), sort_keys=True)
  params = hashlib.sha256()
  for name, value in sorted(model.params.items()):
    params.update(f"{name} {value.dtype} {value.shape}".encode())
    params.update(jax.device_get(value).tobytes())
  return {
      "config": hashlib.sha256(config.encode()).hexdigest(), "params": params.hexdigest(),
      "tokenizer": model.tokenizer.fingerprint,
  }


def make_likelihood(
    model: LoadedModel, *, batch_size: int = 16, carried: bool = True
) -> Likelihood:
  """Returns what scores requests with a loaded model; see `Likelihood`."""
  return Likelihood(
      model.model, model.params, model.tokenizer, window=window_of(model), batch_size=batch_size,
      carried=carried,
  )


@dataclasses.dataclass(frozen=True)
class TaskReport:
  """A model's scores on tasks.

  Attributes:
    model: the model's name.
    step: updates done, of a run.
    digests: SHA-256 of what the model is made of.
    context: how contexts and documents longer than the model's rows were read.
    scores: the scores on each task.
  """

  model: str
  step: int | None
  digests: Mapping[str, str]
  context: str
  scores: tuple[TaskScore, ...]

  def table(self) -> str:
    """Returns the metrics of all tasks, with their standard errors."""
    rows = [("task", "shots", "items", "metric", "value", "stderr")]
    for score in self.scores:
      first = (score.data.task, str(score.data.shots), f"{len(score.data.items):,}")
      for name, value in score.metrics.values.items():
        error = score.metrics.errors[name]
        rows.append((*first, name, fixed(value, 4), "" if math.isnan(error) else fixed(error, 4)))
        first = ("", "", "")
    return table(rows)

  def describe(self) -> str:
    """Returns one line about the model, its context and the definitions."""
    return f"{self.model} (context: {self.context}; tasks as in {DEFINITIONS})"

  def figures(self) -> dict[str, Any]:
    """Returns everything that is to be written as JSON, except the scores of single items."""
    return {
        "model": self.model,
        "step": self.step,
        "sha256": self.digests,
        "versions": {
            "dense_jax": importlib.metadata.version("dense_jax"), "jax": jax.__version__,
            "python": platform.python_version(), "tasks": DEFINITIONS,
        },
        "context": self.context,
        "tasks": {score.data.task: _task_figures(score) for score in self.scores},
    }

  def item_lines(self) -> Iterator[dict[str, Any]]:
    """Yields the scores of each item of each task."""
    for score in self.scores:
      yield from item_lines(score)


def _task_figures(score: TaskScore) -> dict[str, Any]:
  metrics = score.metrics
  return {
      "shots": score.data.shots,
      "metrics": {
          name: {"value": value, "stderr": metrics.errors[name]}
          for name, value in metrics.values.items()
      },
      "counts": metrics.counts,
      "items_in_file": score.data.total,
      "contexts_cut": score.cut,
      "files": score.data.files,
      "seconds": round(score.seconds, 3),
  }


def load_tasks(names: str, folder: str, *, shots: int = 0, limit: int = 0) -> list[TaskData]:
  """Reads the items of tasks, such as "lambada,piqa"; see `load_task`."""
  chosen = parse_names(names, "--tasks")
  return [load_task(name, folder, shots=shots, limit=limit) for name in chosen]


def evaluate_tasks(
    model: LoadedModel, data: Sequence[TaskData], *, batch_size: int = 16, carried: bool = True,
    partial: Path | None = None,
) -> TaskReport:
  """Scores a model on tasks.

  Args:
    model: a run from `restore`, or a model from `load_folder`.
    data: the tasks' items, from `load_tasks`.
    batch_size: rows of a batch; the scores do not depend on it.
    carried: whether contexts and documents of any length are read with the state carried; see
      `Likelihood`.
    partial: a file that keeps the scores of each item as soon as they are known. An evaluation of
      the same model and items that finds it goes on from there. The caller removes it.

  Raises:
    InputError: a continuation does not fit the window, and no state is carried.
  """
  likelihood = make_likelihood(model, batch_size=batch_size, carried=carried)
  known = digests(model)
  with contextlib.ExitStack() as stack:
    kept = None
    if partial is not None:
      key = known | {"context": likelihood.context, "definitions": DEFINITIONS}
      kept = stack.enter_context(contextlib.closing(Partial(partial, key)))
    scores = tuple(evaluate_task(likelihood, task, kept) for task in data)
  step = model.step if isinstance(model, Run) else None
  return TaskReport(model.name, step, known, likelihood.context, scores)
