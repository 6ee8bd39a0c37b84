"""Fused states h' of a layer as a chain of recurrences that deeper layers can read."""

import dataclasses
from collections.abc import Sequence

import jax

from dense_jax.layers.dense.transition import Phi, gate_states
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import (
    Read,
    Recurrence,
    StateMap,
    TokenRecurrence,
    gate_value,
    gated,
)
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusedStates:
  """The recurrence of h' = h + phi(h' of the layer below); a read reads each layer of the chain.

  Attributes:
    own: h.
    below: h' of the layer below.
    phi: the transition of the layer that owns h; must be linear in states.
  """

  own: Recurrence
  below: Recurrence
  phi: Phi

  def run(self, query: Array, reads: Sequence[Read] = ()) -> tuple[Array, Array]:
    """See `Recurrence`; the final state is that of h."""
    return self.own.run(query, (self.phi.as_read(self.below, query), *reads))

  def finish(
      self, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    """See `Recurrence`."""
    return self.own.finish(query, (self.phi.as_read(self.below, query), *reads), epilogue)

  def read(self, query: Array) -> Array:
    """See `Recurrence`."""
    return self.own.read(query) + self.phi.as_read(self.below, query).value()

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """See `Recurrence`; `function` must be linear in the states."""

    def both(h_N: Array, inputs_both: tuple[PyTree, Array | None]) -> Array:
      return function(self.phi.projection(h_N, inputs_both[1]), inputs_both[0])

    below = self.below.read_mapped(query, both, (inputs, self.phi.gate_N))
    return self.own.read_mapped(query, function, inputs) + gated(gate_value(self.phi.gate_E), below)

  def materialize(self) -> Array:
    """See `Recurrence`."""
    by_token = jax.vmap(self.phi.projection, in_axes=1, out_axes=1)
    below = by_token(self.below.materialize(), self.phi.gate_N)
    return self.own.materialize() + gate_states(gate_value(self.phi.gate_E), below)


def fused_states(own: Recurrence, below: Recurrence, phi: Phi) -> Recurrence:
  """Returns h' = own + phi(below): at one token their sum, over a sequence a `FusedStates`."""
  if isinstance(own, TokenRecurrence):
    return own.plus(phi(below.materialize()))
  return FusedStates(own, below, phi)
