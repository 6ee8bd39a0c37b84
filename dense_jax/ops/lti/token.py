"""The recurrence of time-invariant systems at one token of decoding."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from dense_jax.ops.lti.reference import lti_read
from dense_jax.ops.recurrence import ScannedRecurrence, StateMap
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LtiToken(ScannedRecurrence):
  """The state h_BNE, float32, after one token. Queries c_EN are the same for all tokens."""

  h_BNE: Array

  def _scan(self, c_EN: Array) -> tuple[Array, Array]:
    return lti_read(self.h_BNE, c_EN), self.h_BNE

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """See `Recurrence`: c_EN -> y_BE."""
    return jnp.einsum("ben,en->be", function(self.materialize(), inputs), query)

  def materialize(self) -> Array:
    """See `Recurrence`: h_BEN."""
    return jnp.swapaxes(self.h_BNE, 1, 2)

  def plus(self, h: Array) -> Self:
    """See `TokenRecurrence`: h_BEN."""
    return dataclasses.replace(self, h_BNE=self.h_BNE + jnp.swapaxes(h, 1, 2))
