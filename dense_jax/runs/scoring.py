"""Loss, perplexity and bits per byte of a restored run on held-out text."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import tqdm

from dense_jax.config import ExperimentConfig, invalid
from dense_jax.data.packing import TokenStore, build_store
from dense_jax.data.pipeline import heldout_batches
from dense_jax.data.sources import TextSource, split
from dense_jax.evaluation.perplexity import HeldOut, Scorer
from dense_jax.runs.formatting import scaled
from dense_jax.runs.memory import device_memory
from dense_jax.runs.restoring import Run


@dataclasses.dataclass(frozen=True)
class Score:
  """The figures of a text.

  Attributes:
    held_out: loss and perplexity of the targets that were scored.
    bits_per_byte: the text's bits per byte; an estimate if only a part of it was scored.
    num_bytes: UTF-8 bytes of the whole text.
    windows: rows of `config.data.seq_len` tokens in the whole text.
    scored: rows that were scored.
  """

  held_out: HeldOut
  bits_per_byte: float
  num_bytes: int
  windows: int
  scored: int


def evaluate_run(
    run: Run, text: TextSource | None = None, *, batch_size: int = 16, batches: int = 0
) -> Score:
  """Scores a text in windows of `config.data.seq_len` tokens, each with a fresh context.

  Args:
    run: a run from `restore`.
    text: the text to score (see `dense_jax.data.sources.find`); None means the run's held-out text.
    batch_size: windows in a batch; if there are fewer, one batch takes all.
    batches: the most batches to score, spread evenly over the text; 0 means all.

  Raises:
    InputError: the text cannot be read, or the activations of a single layer do not fit the memory.
  """
  data, cache_dir = run.config.data, run.config.data.cache_dir
  text = split(data)[1] if text is None else dataclasses.replace(text, cache_dir=cache_dir)
  store = build_store(text, run.tokenizer, cache_dir)
  return score_store(run, store, batch_size=batch_size, batches=batches)


def score_store(
    run: Run, store: TokenStore, *, batch_size: int = 16, batches: int = 0
) -> Score:
  """Scores a text that is tokenized already; see `evaluate_run`."""
  config = run.config
  windows = store.num_windows(config.data.seq_len)
  batch_size = min(batch_size, windows)  # A row without a window is only padding.
  _check_memory(config, batch_size)
  total = -(-windows // batch_size)
  taken = min(batches, total) if batches else total
  scorer = Scorer(run.model, chunk=config.train.loss_chunk)
  with tqdm.tqdm(
      heldout_batches(store, config.data.seq_len, batch_size, batches), total=taken,
      unit="batch", leave=False, disable=not sys.stderr.isatty(),
  ) as bar:
    held_out = scorer(run.params, bar, jax.device_put)
  return Score(
      held_out, held_out.bits_per_byte(store.targets_per_byte), store.num_bytes,
      windows, min(taken * batch_size, windows),
  )


def _check_memory(config: ExperimentConfig, batch_size: int) -> None:
  """Refuses a batch for which the activations of a single layer do not fit the memory."""
  row = config.data.seq_len * config.model.width * jnp.dtype(config.model.dtype).itemsize
  needed, available = batch_size * row, device_memory()
  if needed > available:
    raise invalid(
        "--batch-size", batch_size, f"at most {available // row}: one layer's activations take "
        f"{scaled(needed, 'B')}, and there are {scaled(available, 'B')}",
    )
