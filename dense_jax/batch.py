"""Packed rows of documents, which the data pipeline makes and models read.

This module does not import jax, because the pipeline does not need it. Arrays are NumPy arrays in
the pipeline and jax arrays on devices; `dense_jax.types` registers the classes with jax. Letters:
`dense_jax.types`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Segments:
  """The borders of documents in packed rows.

  Attributes:
    positions_BT: int32, each token's position in its own document; its B may be 1. A row that
      continues a document begun elsewhere (a carried state, a shard border) begins with a
      position above 0.
    ids_BT: int32. 1, 2, ... number the documents of a row, and every state is reset at a
      document's position 0. 0 is padding, which may only follow a row's last token and leaves
      every state unchanged. None means that each row is one document without padding.
  """

  positions_BT: Array
  ids_BT: Array | None = None

  @property
  def resets_BT(self) -> Array | None:
    """bool, true at each document's first token; None means that no state is ever reset."""
    if self.ids_BT is None:
      return None
    return (self.positions_BT == 0) & (self.ids_BT != 0)

  @property
  def valid_BT(self) -> Array | None:
    """bool, false at padding; None means no padding."""
    return None if self.ids_BT is None else self.ids_BT != 0

  @property
  def positions(self) -> Array:
    """positions_BT, under the name that `Token` shares."""
    return self.positions_BT


@dataclasses.dataclass(frozen=True)
class Token:
  """One token of each row, in decoding.

  Attributes:
    positions_B: int32, the token's position in its document.
  """

  positions_B: Array

  @property
  def positions(self) -> Array:
    """positions_B, under the name that `Segments` shares."""
    return self.positions_B


@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed rows of next-token prediction.

  Attributes:
    tokens_BT: int32 input tokens.
    targets_BT: int32, the token that follows each input token.
    loss_mask_BT: bool, false where the target belongs to another document or is padding.
    segments: the documents' borders.
  """

  tokens_BT: Array
  targets_BT: Array
  loss_mask_BT: Array
  segments: Segments
