"""The contract of a mixer: the part of a layer that moves information along time."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from dense_jax.batch import Segments
from dense_jax.layers.dense_connection import Shared
from dense_jax.ops.state_sequence import StateSequence
from dense_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class MixerOutput:
  """What a mixer gives back.

  Attributes:
    y: [B, T, D], or [B, D] in decoding.
    state: the mixer's state after the last token, as `init_state` shapes it.
    states: the recurrence's states, for deeper layers to read; None where there is none.
    inputs: the recurrence's inputs, for deeper layers to fuse.
  """

  y: Array
  state: PyTree
  states: StateSequence | None
  inputs: dict[str, Array]

  def shared(self, inject: str) -> Shared:
    """What deeper layers get under that injection."""
    return self.states if inject == "state" else self.inputs


class Mixer(Protocol):
  """A family's mixer: parallel over a sequence, or one token at a time."""

  def __call__(
      self, x_BTD: Array, segments: Segments, state: PyTree | None, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """A whole sequence.

    Args:
      x_BTD: the layer's input after its norm.
      segments: the documents.
      state: the state before the first token; None is a fresh one.
      shallow: what the layers below share, nearest first.
    """

  def step(
      self, x_BD: Array, position_B: Array, state: PyTree, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """One token, at `position_B` of its document."""

  def init_state(self, batch: int) -> PyTree:
    """The state before the first token."""
