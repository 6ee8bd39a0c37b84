"""A report's figures and samples of a run that learns a synthetic task."""

import jax
import numpy as np

from dense_jax.data.batches import heldout_batches
from dense_jax.data.row_store import RowStore
from dense_jax.evaluation.perplexity import fixed
from dense_jax.runs.restoring import Run
from dense_jax.runs.scoring import Score

_SAMPLES = 2


def task_rows(score: Score, task: str, name: str) -> list[tuple[str, str]]:
  """Returns the first rows of a report's table.

  Args:
    score: the model's figures of the held-out rows.
    task: the task's name.
    name: the model's name in the table.
  """
  return [
      (f"held-out rows of {task}", name),
      *((f"answers right ({key})", f"{share:.4f}") for key, share in score.answers.items()),
      ("loss, nats per answer", fixed(score.held_out.loss, 4)),
  ]


def task_samples(run: Run, store: RowStore) -> list[tuple[str, str]]:
  """Returns held-out rows up to their first answer, and all their answers beside the model's."""
  config = run.config
  batch = next(heldout_batches(store, config.data.seq_len, _SAMPLES))
  given_BT = run.model.most_likely(jax.device_put(batch), chunk=config.train.loss_chunk)
  rows = (batch.tokens_BT, batch.targets_BT, batch.loss_mask_BT, given_BT)
  pairs = []
  for tokens_T, targets_T, mask_T, given_T in zip(*map(np.asarray, rows), strict=True):
    if np.any(mask_T):
      first = int(np.argmax(mask_T))
      pairs.append((
          _spell(run, tokens_T[: first + 1]),
          f"\nright: {_spell(run, targets_T[mask_T])}\nmodel: {_spell(run, given_T[mask_T])}",
      ))
  return pairs


def _spell(run: Run, ids: np.ndarray) -> str:
  return run.tokenizer.decode(ids.tolist())
