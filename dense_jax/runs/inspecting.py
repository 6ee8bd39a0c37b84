"""Shows a run's data: what there is, how rows are packed, what is in a batch."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from dense_jax.batch import Batch
from dense_jax.config import ExperimentConfig
from dense_jax.data.batches import TrainBatches
from dense_jax.data.pipeline import (
    Datasets,
    rows_to_train,
    text_parts,
    without_target,
)
from dense_jax.data.row_store import JoinedRows, RowStore
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.files import write_atomically
from dense_jax.formatting import printable, table

# Characters of a segment's text that are shown at its beginning and at its end.
_SHOWN = 48


def describe_stores(config: ExperimentConfig, data: Datasets) -> str:
  """Returns a table of documents, tokens and rows: of each part to train on, and held out."""
  length = config.data.seq_len
  rows = rows_to_train(config.data, data.train)
  packed: dict[str, RowStore] = dict(rows.parts) if isinstance(rows, JoinedRows) else {"": rows}
  lines: list[tuple[str, ...]] = [
      ("rows of", "documents", "tokens", "bytes/token", "rows", "without target")
  ]
  texts = text_parts(data.train)
  for name, part in packed.items():
    what = "the whole" if not name else f"part {name}"
    lines.append(_line(what, part, texts.get(name), length))
  lines.append(_line("held out", data.heldout, text_parts(data.heldout).get(""), length))
  return table(lines)


def _line(what: str, rows: RowStore, text: Any, length: int) -> tuple[str, ...]:
  idle = without_target(rows, length)
  return (
      what,
      f"{text.num_documents:,}" if text else "",
      f"{text.num_tokens:,}" if text else "",
      f"{text.num_bytes / text.num_targets:.2f}" if text else "",
      f"{rows.num_windows(length):,}",
      "" if idle is None else f"{idle:.2%}",
  )


def batch_of(config: ExperimentConfig, data: Datasets, step: int) -> tuple[Batch, dict[str, int]]:
  """Returns the global batch of a step, and how many of its rows each part has."""
  with contextlib.closing(TrainBatches(
      rows_to_train(config.data, data.train), config.data.seq_len, config.train.batch_size,
      config.seed, start_step=step, mixtures=config.data.mixtures(),
  )) as batches:
    return next(batches), batches.parts_of(step)


def describe_batch(batch: Batch, parts: dict[str, int], tokenizer: Tokenizer, most: int) -> str:
  """Returns what is in a batch: its mixture, and its first rows, segment by segment.

  Args:
    batch: the batch, of numpy arrays.
    parts: part -> its rows in the batch; "" is the whole.
    tokenizer: decodes the tokens.
    most: the number of rows to show.
  """
  rows, length = np.shape(batch.tokens_BT)
  counted = int(np.sum(batch.loss_mask_BT))
  lines = [f"{rows} rows of {length} tokens; {counted:,} targets ({counted / rows / length:.2%})"]
  if [*parts] != [""]:
    lines.append("mixture: " + ", ".join(f"{name} {count}" for name, count in parts.items()))
  for number in range(min(most, rows)):
    lines.append(f"row {number}")
    for segment, place, ids in _segments(batch, number):
      going_on = "" if ids and ids[0] == tokenizer.bos_id else ", goes on"
      lines.append(f"  {segment}: {len(ids)} tokens at {place}{going_on}  "
                   f"{_shown(tokenizer.decode(ids))}")
  return "\n".join(lines)


def _segments(batch: Batch, row: int) -> Sequence[tuple[int, int, list[int]]]:
  """Returns the number, the first place and the ids of each segment of a row."""
  assert batch.segments.ids_BT is not None
  ids_T = np.asarray(batch.segments.ids_BT[row])
  found = []
  for segment in np.unique(ids_T[ids_T > 0]).tolist():
    places = np.flatnonzero(ids_T == segment)
    ids = np.asarray(batch.tokens_BT[row])[places].tolist()
    found.append((segment, int(places[0]), ids))
  return found


def _shown(text: str) -> str:
  """Returns the ends of a text on one line, fit to print."""
  if len(text) > 2 * _SHOWN + 5:
    text = f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"
  return printable(repr(text))


def draw_batch(batch: Batch, file: epath.Path) -> None:
  """Draws a batch as an image: a line for each row, a colour for each segment.

  Places without a target are darker, and padding is white.
  """
  # Not pyplot, whose backend may be a notebook's.
  from matplotlib import colormaps
  from matplotlib.figure import Figure

  assert batch.segments.ids_BT is not None
  ids_BT = np.asarray(batch.segments.ids_BT)
  colours_BT = colormaps["Set3"]((ids_BT - 1) % 12)[..., :3]
  colours_BT[~np.asarray(batch.loss_mask_BT)] *= 0.45
  colours_BT[ids_BT == 0] = 1.0
  rows, length = ids_BT.shape
  figure = Figure(figsize=(9, min(1.5 + 0.22 * rows, 40)), layout="constrained")
  axes = figure.subplots()
  axes.imshow(colours_BT, aspect="auto", interpolation="nearest")
  axes.set_xlabel(f"token, of {length}")
  axes.set_ylabel("row of the batch")
  axes.set_title("colours: segments; dark: no target; white: padding", fontsize=9)
  image = io.BytesIO()
  figure.savefig(image, format="png", dpi=120)
  file.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(file, image.getvalue())
