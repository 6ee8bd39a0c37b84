"""A recurrence's input, fused with the same input of other layers (arXiv 2403.00818, eq. (5))."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array


class Norm(Protocol):
  """A root-mean-square norm over the last axis."""

  @property
  def epsilon(self) -> float:
    """The number that is added to the mean square."""

  @property
  def scale(self) -> Any:
    """The parameter [E], float32, whose value is scale[...]."""

  def __call__(self, x: Array) -> Array:
    """Maps [..., E] to the same shape, in x's dtype."""


class Injected(NamedTuple):
  """A fused input, and the layer's own for its other readers.

  The own input is the same array twice. A kernel adds the gradients of its readers up where it
  computes the others, so that each of two readers has one to itself.

  Attributes:
    fused_E: the fused input.
    own_E: the own input, for what else the layer does with it.
    shared_E: the own input, for deeper layers.
  """

  fused_E: Array
  own_E: Array
  shared_E: Array


class Inject(Protocol):
  """The type of `inject`, and of forms of it for a platform."""

  def __call__(
      self, own_E: Array, shallow: Sequence[Array], gates: Sequence[LowRankGate | None],
      norm: Norm | None,
  ) -> Injected:
    """See `inject`."""


def inject(
    own_E: Array, shallow: Sequence[Array], gates: Sequence[LowRankGate | None], norm: Norm | None
) -> Injected:
  """Computes norm(own + sum_i gate_i shallow_i), in own's dtype.

  Args:
    own_E: a layer's input of its recurrence, [..., E].
    shallow: the same input of S other layers.
    gates: S gates, which may be the same object; None means 1.
    norm: None means the identity.
  """
  total = own_E
  for read, gate in zip(shallow, gates, strict=True):
    total = total + gated_input(read, gate)
  return Injected(total if norm is None else norm(total), own_E, own_E)


def gated_input(read: Array, gate: LowRankGate | None) -> Array:
  """Multiplies another layer's input by its gate."""
  return read if gate is None else gate.value() * read
