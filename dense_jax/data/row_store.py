"""Rows by their number, of a text or of a synthetic task, of which batches are made."""

from typing import Protocol

import numpy as np


class RowStore(Protocol):
  """Rows that batches are made of."""

  @property
  def fingerprint(self) -> str:
    """Hex digest; two stores with the same fingerprint have the same rows."""
    ...

  @property
  def num_bytes(self) -> int:
    """Number of UTF-8 bytes that the targets of all rows spell; 0 if they are not text."""
    ...

  @property
  def targets_per_byte(self) -> float | None:
    """Targets per byte of the text that they spell; None if they are not text."""
    ...

  def num_windows(self, seq_len: int) -> int:
    """Returns the number of rows of `seq_len` tokens."""
    ...

  def row(self, index: int, seq_len: int) -> dict[str, np.ndarray]:
    """Returns row `index`.

    Args:
      index: the row's number, from 0.
      seq_len: T, the row's input tokens.

    Returns:
      Arrays [T], which become the fields of a `Batch` and its `Segments`:
        tokens, targets: int32; 0 at padding.
        loss_mask: bool; false where the target is not to be predicted, and at padding.
        segment_ids: int32; 1, 2, ... by document; 0 at padding, which follows the last token.
        positions: int32; counted from 0 in each segment; 0 at padding.

    Raises:
      IndexError: there is no such row.
    """
    ...
