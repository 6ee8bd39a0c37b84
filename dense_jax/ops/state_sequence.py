"""StateSequence: what deeper layers know of a layer's states."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar, runtime_checkable

from dense_jax.types import Array, PyTree

Mapped = Callable[[Array, PyTree], Array]
"""A function of one token's states, N last, and of that token's part of some inputs."""


@dataclasses.dataclass(frozen=True)
class GatedRead:
  """A read of another layer's states, times a gate.

  Attributes:
    states: the other layer's, of the reader's own kind.
    query: as of `StateSequence.read`.
    gate: in the size of a read; None is one.
  """

  states: "StateSequence"
  query: Array
  gate: Array | None


class StateSequence(Protocol):
  """The states of one layer, over a sequence or (in decoding) at one token.

  Attributes:
    joint: `read_with` takes others, and one pass over memory serves all of them.
  """

  @property
  def joint(self) -> bool:  # noqa: D102
    ...

  def read_with(self, query: Array, others: Sequence[GatedRead] = ()) -> tuple[Array, Self]:
    """The layer's own read plus the gated reads of others, which need `joint`.

    Returns:
      The sum, float32, and these states with all that reading them has made known.
    """

  def read(self, query: Array) -> Array:
    """Equation (2) with any query; float32."""

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """As `read`, of `function(states, inputs)` in place of the states.

    Token by token in rematerialised chunks: exact for any function, and far slower.

    Args:
      query: as of `read`.
      function: maps [B, ..., N] to the same shape.
      inputs: a tree of [B, T, ...] (in decoding [B, ...]), or None.
    """

  def materialize(self) -> Array:
    """The states themselves, N last; for tests and analysis, never for training."""

  def final(self) -> Array:
    """The state after the last token, to carry on from."""

  def shared(self) -> Self:
    """The same states, as little of them as deeper layers need."""


SequenceT = TypeVar("SequenceT", bound=StateSequence)


class ReadApart:
  """States that are read one layer after the other, each by `read`."""

  @property
  def joint(self) -> bool:
    """See `StateSequence`."""
    return False

  def read_with(
      self: SequenceT, query: Array, others: Sequence[GatedRead] = ()
  ) -> tuple[Array, SequenceT]:
    """See `StateSequence`."""
    assert not others
    return self.read(query), self


@runtime_checkable
class TokenState(StateSequence, Protocol):
  """A StateSequence at one token of decoding, where the states themselves are there."""

  def plus(self, h: Array) -> Self:
    """The states plus others, N last."""
