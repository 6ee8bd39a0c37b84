"""Scores of a model that are taken while it trains: an `Evaluator` is one kind of score."""

import abc
import dataclasses
from collections.abc import Callable, Mapping

from dense_jax.batch import Batch
from dense_jax.config import ExperimentConfig
from dense_jax.data.pipeline import Datasets, heldout_batches
from dense_jax.evaluation.perplexity import HeldOut, Scorer
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A model in training, as an evaluator sees it.

  Attributes:
    step: updates done.
    config: the run's configuration.
    model: the abstract model: `with_params(model, params)` computes.
    params: float32, on training's mesh. Valid during the call only: the next step overwrites them.
    data: the run's text, tokens and tokenizer.
    rows: of a global batch, the rows that this process loads.
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
  """A score that a run takes of its model every so many steps, and after the last.

  A subclass names itself and computes; everything else is done by the run: numbers go to
  metrics.jsonl and TensorBoard as `<name>_<key>`, and a line is printed.

  Attributes:
    name: of the score; unique in a run.
    every: steps from one score to the next; 0 takes `config.train.eval_every`.
  """

  name: str
  every: int = 0

  @abc.abstractmethod
  def evaluate(self, snapshot: Snapshot) -> Mapping[str, float]:
    """The score's numbers by their keys. Of several processes all call it at the same step."""

  def describe(self, numbers: Mapping[str, float], snapshot: Snapshot) -> str:
    """The line that is printed of the numbers that `evaluate` returned."""
    del snapshot
    return f"{self.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())


class HeldOutLoss(Evaluator):
  """Loss and bits per byte of held-out text; by its loss a run ranks its checkpoints."""

  name = "heldout"

  def __init__(self, *, every: int = 0, batches: int | None = None) -> None:
    """Compiles nothing yet.

    Args:
      every: steps; 0 takes `config.train.eval_every`.
      batches: batches of `config.train.batch_size` rows, spread over the text; 0 takes all. None
        means `config.train.eval_batches`.
    """
    self.every, self._batches = every, batches
    self._model: LanguageModel | None = None

  def evaluate(self, snapshot: Snapshot) -> dict[str, float]:
    """`loss`, mean nats a target, and `bits_per_byte`."""
    data, train = snapshot.config.data, snapshot.config.train
    if self._model is not snapshot.model:  # One instance may serve several runs.
      self._model, self._scorer = snapshot.model, Scorer(snapshot.model, chunk=train.loss_chunk)
    limit = train.eval_batches if self._batches is None else self._batches
    store = snapshot.data.heldout
    batches = heldout_batches(store, data.seq_len, train.batch_size, limit, snapshot.rows)
    held_out = self._scorer(snapshot.params, batches, snapshot.put)
    return {"loss": held_out.loss,
            "bits_per_byte": held_out.bits_per_byte(store.num_targets / store.num_bytes)}

  def describe(self, numbers: Mapping[str, float], snapshot: Snapshot) -> str:
    """Loss, perplexity and bits per byte, and how the context was treated."""
    held_out = HeldOut(numbers["loss"], 1, window=snapshot.config.data.seq_len)
    return held_out.describe(numbers["bits_per_byte"])
