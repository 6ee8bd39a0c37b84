"""Scores that a run takes of its model during training: an `Evaluator` is one kind of score."""

import abc
import dataclasses
from collections.abc import Callable, Mapping

from dense_jax.batch import Batch
from dense_jax.config import ExperimentConfig
from dense_jax.data.batches import heldout_batches
from dense_jax.data.pipeline import Datasets
from dense_jax.evaluation.perplexity import HeldOut, Scorer
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A model in training, as an evaluator sees it.

  Attributes:
    step: updates done.
    config: the run's configuration.
    model: the abstract model; `with_params(model, params)` makes one that computes.
    params: float32, on training's mesh; their average if the run keeps one (`train.ema`). Valid
      only during the call: the next step overwrites them.
    data: the run's rows and tokenizer.
    rows: the rows of a global batch that this process loads.
    put: places a host batch of those rows on the mesh.
  """

  step: int
  config: ExperimentConfig
  model: LanguageModel
  params: Params
  data: Datasets
  rows: slice
  put: Callable[[Batch], Batch]


class Evaluator(abc.ABC):
  """A score that a run takes of its model at regular intervals, and after the last step.

  A subclass sets `name` and implements `evaluate`. The run does the rest: it writes the numbers to
  metrics.jsonl and TensorBoard as `<name>_<key>`, and prints a line.

  Attributes:
    name: the score's name, unique in a run.
    every: steps from one score to the next; 0 means `config.train.eval_every`.
  """

  name: str
  every: int = 0

  @abc.abstractmethod
  def evaluate(self, snapshot: Snapshot) -> Mapping[str, float]:
    """Computes the score's numbers by key. With several processes, all call it at the same step."""

  def describe(self, numbers: Mapping[str, float], snapshot: Snapshot) -> str:
    """Returns the line to print about numbers that `evaluate` returned."""
    del snapshot
    return f"{self.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())


class HeldOutLoss(Evaluator):
  """Loss and bits per byte of held-out rows; a run ranks its checkpoints by this loss."""

  name = "heldout"

  def __init__(self, *, every: int = 0, batches: int | None = None) -> None:
    """Sets the interval and the number of batches; nothing is compiled yet.

    Args:
      every: steps from one score to the next; 0 means `config.train.eval_every`.
      batches: batches of `config.train.batch_size` rows, spread evenly over them; 0 means all.
        None means `config.train.eval_batches`.
    """
    self.every, self._batches = every, batches
    self._model: LanguageModel | None = None

  def evaluate(self, snapshot: Snapshot) -> dict[str, float]:
    """Computes `loss`, in mean nats per target, and of text `bits_per_byte`."""
    data, train = snapshot.config.data, snapshot.config.train
    if self._model is not snapshot.model:  # One instance may serve several runs.
      self._model, self._scorer = snapshot.model, Scorer(snapshot.model, chunk=train.loss_chunk)
    limit = train.eval_batches if self._batches is None else self._batches
    store = snapshot.data.heldout
    batches = heldout_batches(store, data.seq_len, train.batch_size, limit, snapshot.rows)
    held_out = self._scorer(snapshot.params, batches, snapshot.put)
    numbers = {"loss": held_out.loss}
    bits = held_out.bits_per_byte(store.targets_per_byte)
    return numbers if bits is None else {**numbers, "bits_per_byte": bits}

  def describe(self, numbers: Mapping[str, float], snapshot: Snapshot) -> str:
    """Returns loss, perplexity and bits per byte, and how the context was treated."""
    held_out = HeldOut(numbers["loss"], 1, window=snapshot.config.data.seq_len)
    return held_out.describe(numbers.get("bits_per_byte"))
