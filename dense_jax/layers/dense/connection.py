"""The interface between a mixer and its layer's dense connection, and the empty connection."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from flax import nnx

from dense_jax.layers.metrics import record_rms
from dense_jax.layers.observation import observe
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import Recurrence
from dense_jax.types import Array

Inputs: TypeAlias = Mapping[str, Array]
"""Name -> a recurrence's input that may be fused, [..., width]."""

Shared: TypeAlias = Recurrence | Inputs | None
"""The states or recurrence inputs that a layer shares with deeper layers; None means nothing."""


@dataclasses.dataclass(frozen=True)
class FusedInputs:
  """The inputs of a recurrence, for each of their readers; see `Injected`.

  Attributes:
    fused: the inputs of the layer's recurrence.
    own: the inputs before fusion, for what else the layer does with them.
    shared: the inputs before fusion, for `share`.
  """

  fused: Inputs
  own: Inputs
  shared: Inputs


NO_INPUTS = FusedInputs({}, {}, {})


class Connection(Protocol):
  """A layer's connection to shallower layers, for a sequence and for one token.

  Mixers know nothing of fusion, and connections nothing of families. `x_D` is the layer's input
  after its norm; `shallow` is what the sources shared, nearest first. Suffixes name trailing axes;
  leading axes are [B, T] or [B].
  """

  def fuse_inputs(self, x_D: Array, own: Inputs, shallow: Sequence[Shared]) -> FusedInputs:
    """Fuses the recurrence's own inputs with those that the sources shared."""

  def run(
      self, x_D: Array, query: Array, states: Recurrence, shallow: Sequence[Shared],
      epilogue: Epilogue,
  ) -> tuple[Output, Array, Recurrence]:
    """Runs the layer's recurrence, and reads those of its sources.

    Args:
      x_D: the layer's input.
      query: the mixer's query, [..., N] or [..., J, N], or [E, N] if it is a parameter.
      states: the layer's recurrence.
      shallow: what the sources shared.
      epilogue: what follows the fused read.

    Returns:
      The epilogue of the fused read; the state after the last token, float32; and the recurrence
      that deeper layers may read.
    """

  def share(self, inputs: FusedInputs, states: Recurrence) -> Shared:
    """Returns what deeper layers may read: the states, or the inputs before or after fusion."""


class NoConnection(nnx.Module):
  """The connection of a layer that reads no other layer; it still shares with deeper ones.

  The base class of the two injections, which replace the one step that they are about.
  """

  def __init__(self, inject: str) -> None:
    self.inject = inject

  def fuse_inputs(self, x_D: Array, own: Inputs, shallow: Sequence[Shared]) -> FusedInputs:
    """See `Connection`: the layer's own inputs, unchanged."""
    del x_D, shallow
    return FusedInputs(own, own, own)

  def run(
      self, x_D: Array, query: Array, states: Recurrence, shallow: Sequence[Shared],
      epilogue: Epilogue,
  ) -> tuple[Output, Array, Recurrence]:
    """See `Connection`: equation (2)."""
    del x_D, shallow
    observe("state", states.materialize)
    record_rms("own_read_rms", lambda: states.read(query))
    output, final = states.finish(query, (), epilogue)
    return output, final, states

  def share(self, inputs: FusedInputs, states: Recurrence) -> Shared:
    """See `Connection`."""
    return states if self.inject == "state" else inputs.shared
