"""Rows by their number, of a text or of a synthetic task, of which batches are made."""

import dataclasses
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import numpy as np

from dense_jax.data.cache import digest


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


class TextRows(RowStore, Protocol):
  """Rows of text, whose targets are counted."""

  @property
  def num_targets(self) -> int:
    """Number of predicted tokens over all rows."""
    ...


PartT = TypeVar("PartT", bound=TextRows, covariant=True)


@dataclasses.dataclass(frozen=True)
class JoinedRows(Generic[PartT]):
  """The rows of several text stores, one store after the other, as a `RowStore`.

  Attributes:
    parts: name -> store.
  """

  parts: Mapping[str, PartT]

  @property
  def fingerprint(self) -> str:
    """Hex digest of the parts' names and fingerprints."""
    pairs = ((name, part.fingerprint) for name, part in self.parts.items())
    return digest("parts", *(text for pair in pairs for text in pair))

  @property
  def num_bytes(self) -> int:
    """See `RowStore.num_bytes`."""
    return sum(part.num_bytes for part in self.parts.values())

  @property
  def num_targets(self) -> int:
    """See `TextRows.num_targets`."""
    return sum(part.num_targets for part in self.parts.values())

  @property
  def targets_per_byte(self) -> float | None:
    """See `RowStore.targets_per_byte`; that of all parts together."""
    return self.num_targets / self.num_bytes

  def num_windows(self, seq_len: int) -> int:
    """Returns the number of rows of all parts."""
    return sum(part.num_windows(seq_len) for part in self.parts.values())

  def row(self, index: int, seq_len: int) -> dict[str, np.ndarray]:
    """Returns row `index`; see `RowStore.row`."""
    for part in self.parts.values():
      count = part.num_windows(seq_len)
      if 0 <= index < count:
        return part.row(index, seq_len)
      index -= count
    raise IndexError(f"there is no row {index} beyond the last one")
