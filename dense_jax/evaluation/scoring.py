"""Scores the items of a task; goes on where it was stopped."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from dense_jax.evaluation.likelihood import Likelihood, Request, Scored, encode_pairs
from dense_jax.evaluation.task_data import TaskData
from dense_jax.evaluation.task_metrics import Metrics, compute_metrics, right_choices
from dense_jax.evaluation.tasks import TASKS, Item
from dense_jax.files import parse_json, write_atomically


@dataclasses.dataclass(frozen=True)
class TaskScore:
  """A model's scores on a task.

  Attributes:
    data: the task's items.
    scored: the scores of each item's pairs; of a document, one score for the whole.
    metrics: the numbers.
    cut: requests whose context was cut on the left, because no state was carried.
    seconds: the time that scoring took, with compilation; 0 if nothing was left to score.
  """

  data: TaskData
  scored: tuple[tuple[Scored, ...], ...]
  metrics: Metrics
  cut: int
  seconds: float


class Partial:
  """A file of the scores of an evaluation that is under way, one line for each item.

  A line is written as soon as an item's scores are known, so that an evaluation that is killed at
  any moment loses the batches under way. The first line is the key: the model, and how it reads.
  What has another key or belongs to other items is not used, nor is a last line that is cut short.
  """

  def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
    """Reads the file, if it is there and has this key, and opens it to go on."""
    self._path = path
    self._scores: dict[str, dict[int, tuple[Scored, ...]]] = {}
    kept = [json.dumps({"key": key}, sort_keys=True)]
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    if lines[:1] == kept:
      for line in lines[1:-1]:  # After the last line end there is nothing, or half a line.
        with contextlib.suppress(ValueError, KeyError, TypeError):
          values = parse_json(line)
          scores = tuple(Scored(float(nats), bool(greedy)) for nats, greedy in values["scores"])
          self._scores.setdefault(values["items"], {})[int(values["item"])] = scores
          kept.append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(line + "\n" for line in kept).encode())
    self._file = path.open("a")

  def scores(self, data: TaskData) -> dict[int, tuple[Scored, ...]]:
    """Returns the scores that are known of a task's items, by their numbers."""
    return dict(self._scores.get(data.digest, {}))

  def add(self, data: TaskData, scores: Mapping[int, tuple[Scored, ...]]) -> None:
    """Writes the scores of some of a task's items."""
    for number, scored in scores.items():
      # As text, a number is exact, and may be infinite.
      pairs = [[repr(score.log_likelihood), score.greedy] for score in scored]
      line = {"items": data.digest, "item": number, "scores": pairs}
      self._file.write(json.dumps(line) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Closes the file, which stays for another start."""
    self._file.close()


def evaluate_task(
    likelihood: Likelihood, data: TaskData, partial: Partial | None = None
) -> TaskScore:
  """Scores the items of a task.

  Args:
    likelihood: scores requests with the model.
    data: the items.
    partial: has the scores of an evaluation that was stopped, and is told new ones.

  Raises:
    InputError: a continuation does not fit the window, and no state is carried.
  """
  start = time.monotonic()
  known = {} if partial is None else partial.scores(data)
  with tqdm.tqdm(
      total=len(data.items), initial=len(known), desc=data.task, unit="item", leave=False,
      disable=not sys.stderr.isatty(),
  ) as bar:
    left = [number for number in range(len(data.items)) if number not in known]
    groups = _requests(likelihood, [data.items[number] for number in left], data.task)
    owners = [(number, part) for number, group in zip(left, groups, strict=True)
              for part in range(len(group))]
    found: dict[int, dict[int, Scored]] = {number: {} for number in left}
    sizes = {number: len(group) for number, group in zip(left, groups, strict=True)}

    def on_done(scores: Mapping[int, Scored]) -> None:
      complete = {}
      for index, score in scores.items():
        number, part = owners[index]
        found[number][part] = score
        if len(found[number]) == sizes[number]:
          complete[number] = _joined(data.task, found[number])
      known.update(complete)
      if partial is not None:
        partial.add(data, complete)
      bar.update(len(complete))

    requests = [request for group in groups for request in group]
    likelihood.score(requests, on_done)
    known.update({number: _joined(data.task, {}) for number in left if not sizes[number]})
  scored = tuple(known[number] for number in range(len(data.items)))
  return TaskScore(
      data, scored, compute_metrics(data.task, data.items, scored),
      sum(map(likelihood.is_cut, requests)), time.monotonic() - start if left else 0.0,
  )


def _requests(
    likelihood: Likelihood, items: Sequence[Item], task: str
) -> list[list[Request]]:
  """Returns the requests of each item: its pairs, or the windows of a document."""
  tokenizer = likelihood.tokenizer
  if TASKS[task].kind == "document":
    texts = [item.pairs[0][1] for item in items]
    return [likelihood.windows(ids) for ids in tokenizer.encode_batch(texts)]
  requests = iter(encode_pairs(tokenizer, [pair for item in items for pair in item.pairs]))
  return [[next(requests) for _ in item.pairs] for item in items]


def _joined(task: str, parts: Mapping[int, Scored]) -> tuple[Scored, ...]:
  """Returns an item's scores in order; those of a document's windows as one."""
  scores = [parts[part] for part in sorted(parts)]
  if TASKS[task].kind != "document":
    return tuple(scores)
  return (Scored(
      sum(score.log_likelihood for score in scores), all(score.greedy for score in scores)
  ),)


def item_lines(score: TaskScore) -> Iterator[dict[str, Any]]:
  """Yields what is known of each item, to be written as a line of JSON."""
  task = TASKS[score.data.task]
  for number, (item, scored) in enumerate(zip(score.data.items, score.scored, strict=True)):
    line: dict[str, Any] = {
        "task": score.data.task, "item": number, "id": item.name,
        "log_likelihoods": [one.log_likelihood for one in scored],
        "greedy": [one.greedy for one in scored],
    }
    if task.kind in ("choice", "blank"):
      right = right_choices(item, scored)
      line |= {"gold": item.gold} | {metric: right[metric] for metric in task.metrics}
    yield line
