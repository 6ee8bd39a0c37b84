"""A recurrence's input, fused with the same input of other layers (arXiv 2403.00818, eq. (5))."""

from collections.abc import Sequence
from typing import Any, Protocol

from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array


class Norm(Protocol):
  """A root-mean-square norm over the last axis.

  Attributes:
    epsilon: what is added to the mean square.
    scale: the parameter [E], float32, whose value is scale[...].
  """

  epsilon: float
  scale: Any

  def __call__(self, x: Array) -> Array:
    """Maps [..., E] to the same shape, in x's dtype."""


class Inject(Protocol):
  """The type of `inject`, and of forms of it for a platform."""

  def __call__(
      self, own_E: Array, shallow: Sequence[Array], gates: Sequence[LowRankGate | None],
      norm: Norm | None,
  ) -> Array:
    """See `inject`."""


def inject(
    own_E: Array, shallow: Sequence[Array], gates: Sequence[LowRankGate | None], norm: Norm | None
) -> Array:
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
  return total if norm is None else norm(total)


def gated_input(read: Array, gate: LowRankGate | None) -> Array:
  """Multiplies another layer's input by its gate."""
  return read if gate is None else gate.value() * read
