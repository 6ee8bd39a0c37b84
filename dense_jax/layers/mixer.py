"""The contract of a mixer: the part of a layer that moves information along time."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Protocol

import jax

from dense_jax.batch import Segments, Token
from dense_jax.layers.dense.connection import Shared
from dense_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class MixerOutput:
  """The result of a mixer.

  Attributes:
    y: [B, T, D], or [B, D] for one token, in the input's dtype.
    state: the mixer's state after the last token, of the structure of `init_state`.
    shared: the states or inputs that deeper layers may read; None means nothing.
  """

  y: Array
  state: PyTree
  shared: Shared


class Mixer(Protocol):
  """A family's mixer, with one call for a sequence in parallel and for one token of decoding."""

  form: ClassVar[str]
  """The form of the mixer's state, a key of `dense_jax.ops.resolver.IMPLEMENTATIONS`."""

  def __call__(
      self, x_D: Array, tokens: Segments | Token, state: PyTree | None,
      shallow: Sequence[Shared],
  ) -> MixerOutput:
    """Mixes a sequence [B, T, D] or one token [B, D].

    Args:
      x_D: the layer's input after its norm.
      tokens: the sequence's documents, or the one token.
      state: the state before the first token; None means a fresh one, and is not allowed for one
        token.
      shallow: `MixerOutput.shared` of the layers that this one reads, nearest first.
    """

  def init_state(self, batch: int) -> PyTree:
    """Returns the state before the first token of a document.

    A recurrence's state is float32, in a field whose name begins with `h_`; see
    `cast_recurrences`.
    """


def cast_recurrences(states: PyTree, dtype: jax.typing.DTypeLike) -> PyTree:
  """Casts the states of recurrences, the fields `h_*` of mixers' states, and nothing else."""

  def cast(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.Array) -> jax.Array:
    is_recurrence = isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name[:2] == "h_"
    return leaf.astype(dtype) if is_recurrence else leaf

  return jax.tree_util.tree_map_with_path(cast, states)
