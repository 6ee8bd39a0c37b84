"""Loss, perplexity and bits per byte of a restored run on held-out text; answers of its task."""

import dataclasses
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import tqdm

from dense_jax.batch import Batch
from dense_jax.config import DataConfig, ModelConfig, TrainConfig, invalid
from dense_jax.data.batches import heldout_batches
from dense_jax.data.packing import build_store
from dense_jax.data.pipeline import heldout_store
from dense_jax.data.row_store import RowStore
from dense_jax.data.sources import TextSource
from dense_jax.evaluation.exact_match import AnswerCounter, count_answers, describe_shares
from dense_jax.evaluation.perplexity import HeldOut, Scorer
from dense_jax.formatting import scaled
from dense_jax.runs.memory import device_memory
from dense_jax.runs.restoring import LoadedModel, Run
from dense_jax.runs.tasks import window_of


@dataclasses.dataclass(frozen=True)
class Score:
  """The figures of a text, or of a synthetic task's held-out rows.

  Attributes:
    held_out: loss and perplexity of the targets that were scored.
    bits_per_byte: the text's bits per byte; an estimate if only a part of it was scored; None of a
      task.
    num_bytes: UTF-8 bytes of the whole text; 0 of a task.
    windows: rows of `config.data.seq_len` tokens in all.
    scored: rows that were scored.
    answers: the shares of right answers; see `count_answers`. They are {} of a text.
  """

  held_out: HeldOut
  bits_per_byte: float | None
  num_bytes: int
  windows: int
  scored: int
  answers: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def describe(self) -> str:
    """Returns a line of figures, and of a task a second one with the shares of right answers."""
    figures = self.held_out.describe(self.bits_per_byte)
    return f"{figures}\nanswers: {describe_shares(self.answers)}" if self.answers else figures


def evaluate_run(
    run: LoadedModel, text: TextSource | None = None, *, batch_size: int = 16, batches: int = 0
) -> Score:
  """Scores rows of `config.data.seq_len` tokens, each with a fresh context.

  Args:
    run: a run from `restore`, or a model from `load_folder`, whose windows are `window_of` it.
    text: the text to score (see `dense_jax.data.sources.find`); None means the run's
      held-out text, or the held-out rows of its task.
    batch_size: windows in a batch; if there are fewer, one batch takes all.
    batches: the most batches to score, spread evenly over the text; 0 means all.

  Raises:
    InputError: the text cannot be read, the activations of a single layer do not fit the memory, or
      a model that is not a run was given no text.
  """
  data = run.config.data if isinstance(run, Run) else DataConfig()
  if text is not None:
    text = dataclasses.replace(text, cache_dir=data.cache_dir)
    store: RowStore = build_store(text, run.tokenizer, data.cache_dir)
    return score_store(run, store, batch_size=batch_size, batches=batches)
  if not isinstance(run, Run):
    raise invalid("--text", None, f"a text, for {run.name} is not a run with a held-out one")
  return score_heldout(run, batch_size=batch_size, batches=batches)


def score_heldout(run: Run, *, batch_size: int = 16, batches: int = 0) -> Score:
  """Scores a run's held-out text, or the held-out rows of its task; see `evaluate_run`."""
  data = run.config.data
  store = heldout_store(data, run.tokenizer)
  score = score_store(run, store, batch_size=batch_size, batches=batches)
  if not data.task.exists:
    return score
  counter = AnswerCounter(run.model, chunk=run.config.train.loss_chunk)
  answers = count_answers(
      counter, run.params, data, jax.device_put, batch_size=batch_size, limit=batches
  )
  return dataclasses.replace(score, answers=answers)


def score_store(
    run: LoadedModel, store: RowStore, *, batch_size: int = 16, batches: int = 0
) -> Score:
  """Scores rows; see `evaluate_run`."""
  window = window_of(run)
  train = run.config.train if isinstance(run, Run) else TrainConfig()
  windows = store.num_windows(window)
  batch_size = min(batch_size, windows)  # A row without a window is only padding.
  _check_memory(run.model.config, window, batch_size)
  total = -(-windows // batch_size)
  taken = min(batches, total) if batches else total
  scorer = Scorer(run.model, chunk=train.loss_chunk)
  with tqdm.tqdm(
      heldout_batches(store, window, batch_size, batches), total=taken,
      unit="batch", leave=False, disable=not sys.stderr.isatty(),
  ) as bar:
    held_out = scorer(run.params, bar, jax.device_put)
  return Score(
      held_out, held_out.bits_per_byte(store.targets_per_byte), store.num_bytes,
      windows, min(taken * batch_size, windows),
  )


def heldout_rows(run: Run, batch_size: int, batches: int, length: int = 0) -> list[Batch]:
  """Returns held-out rows of a run.

  Args:
    run: the run.
    batch_size: rows of a batch.
    batches: the most batches, spread evenly over the rows; 0 means all.
    length: tokens of a row; 0 means `config.data.seq_len`.

  Raises:
    InputError: the text is no longer where it was.
  """
  data = run.config.data
  store = heldout_store(data, run.tokenizer)
  return list(heldout_batches(store, length or data.seq_len, batch_size, batches))


def _check_memory(config: ModelConfig, window: int, batch_size: int) -> None:
  """Refuses a batch for which the activations of a single layer do not fit the memory."""
  row = window * config.width * jnp.dtype(config.dtype).itemsize
  needed, available = batch_size * row, device_memory()
  if needed > available:
    raise invalid(
        "--batch-size", batch_size, f"at most {available // row}: one layer's activations take "
        f"{scaled(needed, 'B')}, and there are {scaled(available, 'B')}",
    )
