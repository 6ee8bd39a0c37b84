"""The recurrence with a matrix state at one token of decoding."""

import dataclasses
from typing import Self

import jax

from dense_jax.ops.matrix.reference import matrix_read
from dense_jax.ops.recurrence import ScannedRecurrence, StateMap
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixToken(ScannedRecurrence):
  """The state h_BHPN, float32, after one token."""

  h_BHPN: Array

  def _scan(self, q_BJN: Array) -> tuple[Array, Array]:
    # Without the barrier, XLA for GPUs merges the read's sum over N with an epilogue's sum over P.
    # That is one more pass over the state, half of the bytes of a retention's step.
    return jax.lax.optimization_barrier(matrix_read(self.h_BHPN, q_BJN)), self.h_BHPN

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """See `Recurrence`: q_BJN -> y_BHP."""
    return matrix_read(function(self.h_BHPN, inputs), query)

  def materialize(self) -> Array:
    """See `Recurrence`: h_BHPN."""
    return self.h_BHPN

  def plus(self, h: Array) -> Self:
    """See `TokenRecurrence`: h_BHPN."""
    return dataclasses.replace(self, h_BHPN=self.h_BHPN + h)
