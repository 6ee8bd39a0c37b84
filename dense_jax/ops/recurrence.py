"""The seam between families and dense connections: `Recurrence`, and what reads it.

A layer makes its recurrence from its input and runs it. A deeper layer asks the same recurrence a
question of its own, a query, and gets the answer of equation (2) without the states ever being
stored: a recurrence holds its inputs, and reading makes the states again. That identity is what
makes dense state connections affordable.

Letters: `dense_jax.types`. A query has the form that the family's recurrence asks for, and a read
the size of the layer's output, [..., E] or [..., H, P]; leading axes are [B, T] for a sequence and
[B] for one token of decoding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from dense_jax.types import Array, PyTree

FLOAT32 = jnp.dtype("float32")

StateMap = Callable[[Array, PyTree], Array]
"""A function of one token's states, [B, ..., N] to the same shape, and of that token's inputs."""


class Recurrence(Protocol):
  """The states h of one layer, over a sequence or at one token: an immutable pytree.

  h_t = a_t h_{t-1} + u_t    (1)        y_t = C_t h_t    (2)
  """

  def run(self, query: Array, reads: Sequence["Read"] = ()) -> tuple[Array, Array]:
    """Runs the recurrence for the layer that owns it.

    Args:
      query: C, the layer's own.
      reads: gated reads of other layers' recurrences, to be added to the layer's own.

    Returns:
      The sum of all reads, float32, and the state after the last token that is not padding,
      float32, to carry on from.
    """

  def read(self, query: Array) -> Array:
    """Answers equation (2) for any query, float32."""

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """Answers equation (2) for `function(h, inputs)` in place of h, float32.

    Runs token by token in rematerialised chunks: exact for any function, and far slower than
    `read`.

    Args:
      query: as of `read`.
      function: what is made of a token's states.
      inputs: a tree of [B, T, ...] (in decoding [B, ...]), or None.
    """

  def materialize(self) -> Array:
    """Computes the states themselves, N last; for tests and analysis, never for training."""


@runtime_checkable
class TokenRecurrence(Recurrence, Protocol):
  """A recurrence at one token of decoding, where the states themselves are there."""

  def plus(self, h: Array) -> Self:
    """Adds other states, N last, to these."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
  """A gated read of another layer's states: gate * (C f(h)).

  Attributes:
    recurrence: the other layer's.
    query: C.
    gate: in the size of the read; None means 1.
    inputs: of `function`.
    function: f, a pytree that can be called, where no query of h reads f(h); None means the
      identity.
    dtype: the dtype to which the read is rounded before the gate, in which the backward pass
      keeps it.
    recompute: whether the backward pass computes the read again, alone, instead of keeping
      what is inside it.
  """

  recurrence: Recurrence
  query: Array
  gate: Array | None = None
  inputs: PyTree = None
  function: StateMap | None = None
  dtype: jnp.dtype = dataclasses.field(default=FLOAT32, metadata={"static": True})
  recompute: bool = dataclasses.field(default=False, metadata={"static": True})

  def ungated(self) -> Array:
    """Returns the read before the gate, rounded to `dtype`."""
    if self.function is None:
      return self.recurrence.read(self.query).astype(self.dtype)
    y = self.recurrence.read_mapped(self.query, self.function, self.inputs)
    return y.astype(self.dtype)

  def value(self) -> Array:
    """Returns the gated read, float32."""
    if not self.recompute:
      return gated(self.gate, self.ungated())
    y = jax.checkpoint(Read.ungated)(dataclasses.replace(self, gate=None))
    # Kept are the gate and the read in the model's dtype, not in float32.
    return jax.checkpoint(gated)(self.gate, y)


def gated(gate: Array | None, y: Array) -> Array:
  """Multiplies a read by its gate, which may have another shape of the same size; float32."""
  y = y.astype(jnp.float32)
  return y if gate is None else gate.astype(jnp.float32).reshape(y.shape) * y


def gated_reads(own: Array, reads: Sequence[Read]) -> list[Array]:
  """Computes gated reads one after the other.

  Args:
    own: the layer's own read, float32.
    reads: those of other layers' recurrences.

  Returns:
    The own read and the gated ones, all float32.
  """
  values = [own]
  for read in reads:
    if read.recompute:
      # One after the other in the backward pass too: so that no two reads' intermediate values
      # exist together.
      recurrence, values[-1] = jax.lax.optimization_barrier((read.recurrence, values[-1]))
      read = dataclasses.replace(read, recurrence=recurrence)
    values.append(read.value())
  return values


def add_reads(own: Array, reads: Sequence[Read]) -> Array:
  """Adds gated reads to the layer's own, one after the other: the default of `Recurrence.run`."""
  own, *others = gated_reads(own, reads)
  return sum(others, start=own)
