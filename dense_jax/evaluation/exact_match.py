"""Shares of right answers in a synthetic task."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax import distributed, sharding
from dense_jax.batch import Batch
from dense_jax.config import DataConfig
from dense_jax.data.batches import heldout_batches
from dense_jax.data.synthetic.store import heldout_rows
from dense_jax.evaluation.evaluators import Evaluator, Snapshot
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import with_params
from dense_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Answers:
  """Counts of answers.

  Attributes:
    right, targets: the targets that have the largest logit, and all targets.
    exact, rows: the rows all of whose targets have it, and all rows.
  """

  right: int
  targets: int
  exact: int
  rows: int

  def shares(self) -> dict[str, float]:
    """Returns `accuracy`, the share of right targets, and `exact`, that of exact rows."""
    return {"accuracy": self.right / self.targets, "exact": self.exact / self.rows}


class AnswerCounter:
  """Counts right answers with a compiled step."""

  def __init__(self, model: LanguageModel, *, chunk: int) -> None:
    """Makes the step, which is compiled once for each length of rows.

    Args:
      model: the model, which may be abstract.
      chunk: tokens of a row whose logits exist at one time.
    """

    @sharding.sum_over_sequence
    def count(params: Params, batch: Batch) -> tuple[Array, Array]:
      answers_BT = with_params(model, params).most_likely(batch, chunk=chunk)
      right_BT = batch.loss_mask_BT & (answers_BT == batch.targets_BT)
      return (jnp.sum(right_BT, axis=1, dtype=jnp.int32),
              jnp.sum(batch.loss_mask_BT, axis=1, dtype=jnp.int32))

    self.count: Callable[[Params, Batch], tuple[Array, Array]] = jax.jit(count)

  def __call__(
      self, params: Params, batches: Iterable[Batch], put: Callable[[Batch], Batch]
  ) -> Answers:
    """Counts over host batches, of which each process passes its own rows; rows of padding are not.

    Args:
      params: the model's parameters.
      batches: host batches; each row has a target, unless it is padding.
      put: places a host batch on the devices.

    Raises:
      ValueError: the batches have no target.
    """
    counts = np.zeros(4, np.int64)
    for batch in batches:
      with sharding.mesh_of(params):
        right_B, targets_B = distributed.to_host(self.count(params, put(batch)))
      exact_B = (right_B == targets_B) & (targets_B > 0)
      counts += [right_B.sum(), targets_B.sum(), exact_B.sum(), (targets_B > 0).sum()]
    answers = Answers(*counts.tolist())
    if not answers.targets:
      raise ValueError("no held-out targets: the held-out rows have no answer to predict")
    return answers


def count_answers(
    counter: AnswerCounter, params: Params, config: DataConfig, put: Callable[[Batch], Batch], *,
    batch_size: int, limit: int = 0, rows: slice | None = None,
) -> dict[str, float]:
  """Scores the answers of held-out rows, of each length and depth that the configuration names.

  Args:
    counter: the model's.
    params: its parameters.
    config: has a task.
    put: places a host batch on the devices.
    batch_size: rows of a batch.
    limit: the most batches of each length and depth; 0 means all.
    rows: the rows of each batch that this process loads; None means all.

  Returns:
    `accuracy` and `exact` of rows as in training; those of others end in the length, the depth or
    both, such as `exact_512`.
  """
  numbers: dict[str, float] = {}
  for kind in heldout_rows(config):
    batches = heldout_batches(kind.store, kind.seq_len, batch_size, limit, rows)
    shares = counter(params, batches, put).shares()
    numbers |= {name + kind.suffix: share for name, share in shares.items()}
  return numbers


class ExactMatch(Evaluator):
  """Shares of right answers in a run's synthetic task.

  A run records them as `task_accuracy` and `task_exact`, and those of further lengths and depths
  under names such as `task_exact_512`; see `count_answers`.
  """

  name = "task"

  def __init__(self, *, every: int = 0) -> None:
    """Sets the interval; nothing is compiled yet.

    Args:
      every: steps from one score to the next; 0 means `config.train.eval_every`.
    """
    self.every = every
    self._model: LanguageModel | None = None

  def evaluate(self, snapshot: Snapshot) -> dict[str, float]:
    """Computes `accuracy` and `exact`, and those of further lengths and depths."""
    train = snapshot.config.train
    if self._model is not snapshot.model:  # One instance may serve several runs.
      self._model = snapshot.model
      self._counter = AnswerCounter(snapshot.model, chunk=train.loss_chunk)
    return count_answers(
        self._counter, snapshot.params, snapshot.config.data, snapshot.put,
        batch_size=train.batch_size, limit=train.eval_batches, rows=snapshot.rows,
    )

  def describe(self, numbers: Mapping[str, float], snapshot: Snapshot) -> str:
    """Returns the shares in the order of `count_answers`."""
    return f"{snapshot.config.data.task.name}: {describe_shares(numbers)}"


def describe_shares(numbers: Mapping[str, float]) -> str:
  """Returns the shares of `count_answers` as text."""
  return ", ".join(f"{name} {share:.4f}" for name, share in numbers.items())
