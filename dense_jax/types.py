"""Shared types and the one legend of dimension letters.

Arrays carry their axes as a suffix: ``x_BTD`` is batch, time, model width.

    B  batch                     N  state size, or query/key width of one head
    T  time (tokens)             K  query/key width of all heads together
    D  model width               C  chunk length (tokens)
    E  inner width, H * P        G  chunks in a sequence, ceil(T / C)
    H  heads                     L  layers
    P  channels of one head      S  sources: shallower layers that a layer reads
    V  vocabulary                W  taps of a short convolution
    R  rank of a low-rank map    J  groups of heads that share keys and queries
    M  conjugate pairs of a complex state, N / 2

A scalar axis of size one that broadcasts keeps its letter.
"""

import dataclasses
from typing import Any, TypeAlias

import jax

# The mesh axes that split rows, the one that splits a row's tokens, and the one that splits
# channels and heads.
BATCH_AXES = ("slices", "data", "fsdp")
SEQUENCE_AXIS = "sequence"
WIDTH_AXIS = "tensor"

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Params: TypeAlias = dict[str, jax.Array]
"""A model's parameters, flat: dotted path (``stack.head.0.mixer.a_log``) to array."""


class InputError(ValueError):
  """The user's input is wrong: a config value, a path, a file's content.

  Its message names the field, the value and what would be valid. Every command
  line prints it without a traceback and ends with status 2.
  """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
  """Where the documents of packed rows begin and end.

  Attributes:
    positions_BT: int32, the token's position in its own document; its B may be 1. A row
      that goes on with a document begun elsewhere (a carried state, a shard border)
      begins with a position above 0.
    ids_BT: int32 or None. 1, 2, ... number the documents of a row, and every state is
      reset where a position is 0; 0 is padding, which may only follow a row's last token
      and leaves every state as it is. None: each row is one document without padding.
  """

  positions_BT: Array
  ids_BT: Array | None = None

  @property
  def resets_BT(self) -> Array | None:
    """bool, true at each document's first token; None where nothing is ever reset."""
    if self.ids_BT is None:
      return None
    return (self.positions_BT == 0) & (self.ids_BT != 0)

  @property
  def valid_BT(self) -> Array | None:
    """bool, false at padding; None where there is none."""
    return None if self.ids_BT is None else self.ids_BT != 0


@jax.tree_util.register_dataclass
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
