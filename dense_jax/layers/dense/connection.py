"""A layer's dense connection as its mixer sees it, and the connection of a layer without one."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from flax import nnx

from dense_jax.ops.recurrence import Recurrence
from dense_jax.types import Array

Inputs: TypeAlias = Mapping[str, Array]
"""The inputs of a recurrence that may be fused, by name, [..., width] each."""

Shared: TypeAlias = Recurrence | Inputs | None
"""What a layer leaves for deeper ones to read: its states, or its recurrence's inputs."""


class Connection(Protocol):
  """How a layer reads what shallower layers share, for a sequence and for one token alike.

  A mixer hands over what it has and knows nothing of fusion; a connection knows nothing of
  families. `x_D` is the layer's input after its norm, and `shallow` what the sources shared,
  nearest first; suffixes name trailing axes, and leading axes are [B, T] or [B].
  """

  def fuse_inputs(self, x_D: Array, own: Inputs, shallow: Sequence[Shared]) -> Inputs:
    """Returns the inputs that enter the layer's recurrence, made from its own ones."""

  def run(
      self, x_D: Array, query: Array, states: Recurrence, shallow: Sequence[Shared]
  ) -> tuple[Array, Array, Recurrence]:
    """Runs the layer's recurrence, and reads those of its sources.

    Args:
      x_D: the layer's input.
      query: the mixer's query, [..., N], [..., J, N], or [E, N] where it is fixed.
      states: the layer's recurrence.
      shallow: what the sources shared.

    Returns:
      The fused read, [..., E] or [..., H, P] in float32; the state to carry on from; and the
      recurrence that deeper layers may read.
    """

  def share(self, own: Inputs, fused: Inputs, states: Recurrence) -> Shared:
    """Chooses what the layer leaves for deeper ones, from what the two methods above gave."""


class NoConnection(nnx.Module):
  """The connection of a layer that reads no other; it shares what deeper layers read."""

  def __init__(self, inject: str) -> None:
    self.inject = inject

  def fuse_inputs(self, x_D: Array, own: Inputs, shallow: Sequence[Shared]) -> Inputs:
    """See `Connection`: the layer's own inputs as they are."""
    del x_D, shallow
    return own

  def run(
      self, x_D: Array, query: Array, states: Recurrence, shallow: Sequence[Shared]
  ) -> tuple[Array, Array, Recurrence]:
    """See `Connection`: equation (2)."""
    del x_D, shallow
    return *states.run(query), states

  def share(self, own: Inputs, fused: Inputs, states: Recurrence) -> Shared:
    """See `Connection`."""
    del fused
    return states if self.inject == "state" else own
