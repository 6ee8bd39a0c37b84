"""The numbers of a task from the scores of its items, with standard errors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dense_jax.evaluation.likelihood import Scored
from dense_jax.evaluation.tasks import TASKS, Item, count_words


@dataclasses.dataclass(frozen=True)
class Metrics:
  """The numbers of a task.

  Attributes:
    values: by name, in the order of the task's definition.
    errors: the standard error of each; NaN where there is one item only.
    counts: what the numbers are means over: "items", and the "words" and "bytes" of documents.
  """

  values: Mapping[str, float]
  errors: Mapping[str, float]
  counts: Mapping[str, int]


def right_choices(item: Item, scored: Sequence[Scored]) -> dict[str, bool]:
  """Returns whether the best choice is the right one, by its log-likelihood.

  `acc` takes it as it is, `acc_norm` divides it by the choice's characters, and `acc_bytes` by its
  UTF-8 bytes. The first of equal ones is the best.
  """
  log_likelihoods = np.array([score.log_likelihood for score in scored])
  lengths = {
      "acc": np.ones(len(scored)),
      "acc_norm": np.array([len(choice) for choice in item.choices], float),
      "acc_bytes": np.array([len(choice.encode()) for choice in item.choices], float),
  }
  with np.errstate(divide="ignore", invalid="ignore"):
    return {
        name: bool(np.argmax(log_likelihoods / length) == item.gold)
        for name, length in lengths.items()
    }


def compute_metrics(
    name: str, items: Sequence[Item], scored: Sequence[Sequence[Scored]]
) -> Metrics:
  """Returns a task's numbers.

  Args:
    name: the task's name.
    items: its items, at least one.
    scored: the scores of each item's pairs.
  """
  task, counts = TASKS[name], {"items": len(items)}
  if task.kind == "document":
    nats = np.array([-pairs[0].log_likelihood for pairs in scored])
    words = np.array([count_words(item.choices[0]) for item in items])
    size = np.array([len(item.choices[0].encode()) for item in items])
    counts |= {"words": int(words.sum()), "bytes": int(size.sum())}
    by_word, by_byte = _ratio(nats, words), _ratio(nats, size)
    found = {
        "word_perplexity": _exponential(*by_word), "byte_perplexity": _exponential(*by_byte),
        "bits_per_byte": (by_byte[0] / math.log(2), by_byte[1] / math.log(2)),
    }
  elif task.kind == "word":
    nats = np.array([-pairs[0].log_likelihood for pairs in scored])
    right = np.array([pairs[0].greedy for pairs in scored], float)
    found = {"acc": _mean(right), "perplexity": _exponential(*_mean(nats))}
  else:
    chosen = [right_choices(item, pairs) for item, pairs in zip(items, scored, strict=True)]
    found = {
        metric: _mean(np.array([choice[metric] for choice in chosen], float))
        for metric in task.metrics
    }
  values, errors = ({metric: found[metric][part] for metric in task.metrics} for part in (0, 1))
  return Metrics(values, errors, counts)


def _mean(values: np.ndarray) -> tuple[float, float]:
  """Returns the mean, and its standard error by the sample's variance."""
  count = len(values)
  error = math.sqrt(float(values.var(ddof=1)) / count) if count > 1 else math.nan
  return float(values.mean()), error


def _ratio(parts: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
  """Returns sum(parts) / sum(sizes), and its standard error over documents.

  The error is that of the linearised ratio: of the parts' distances from ratio * sizes.
  """
  ratio, count = float(parts.sum() / sizes.sum()), len(parts)
  if count == 1:
    return ratio, math.nan
  apart = parts - ratio * sizes
  return ratio, math.sqrt(count / (count - 1) * float((apart**2).sum())) / float(sizes.sum())


def _exponential(value: float, error: float) -> tuple[float, float]:
  """Returns exp(value), and its error to first order; infinite beyond float64."""
  with np.errstate(over="ignore"):
    raised = float(np.exp(value))
  return raised, raised * error
