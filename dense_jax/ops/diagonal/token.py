"""The recurrence with a diagonal state at one token of decoding."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from dense_jax.ops.diagonal.reference import diagonal_read
from dense_jax.ops.recurrence import ScannedRecurrence, StateMap
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalToken(ScannedRecurrence):
  """The state h_BNE, float32, after one token."""

  h_BNE: Array

  def _scan(self, c_BN: Array) -> tuple[Array, Array]:
    return diagonal_read(self.h_BNE, c_BN), self.h_BNE

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """See `Recurrence`: c_BN -> y_BE."""
    h_BEN = function(self.materialize(), inputs)
    return jnp.einsum("ben,bn->be", h_BEN, query.astype(jnp.float32))

  def materialize(self) -> Array:
    """See `Recurrence`: h_BEN."""
    return jnp.swapaxes(self.h_BNE, 1, 2)

  def plus(self, h: Array) -> Self:
    """See `TokenRecurrence`: h_BEN."""
    return dataclasses.replace(self, h_BNE=self.h_BNE + jnp.swapaxes(h, 1, 2))
