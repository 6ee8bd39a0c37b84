"""States at one token of decoding, where the states themselves are there."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from dense_jax.ops import reference
from dense_jax.ops.state_sequence import Mapped, ReadApart
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalState(ReadApart):
  """A diagonal state at one token of decoding."""

  h_BNE: Array

  def read(self, query: Array) -> Array:
    """c_BN -> y_BE."""
    return reference.diagonal_read(self.h_BNE, query)

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """c_BN -> y_BE."""
    h_BEN = function(self.materialize(), inputs)
    return jnp.einsum("ben,bn->be", h_BEN, query.astype(jnp.float32))

  def plus(self, h: Array) -> Self:
    """See `TokenState`."""
    return dataclasses.replace(self, h_BNE=self.h_BNE + jnp.swapaxes(h, 1, 2))

  def materialize(self) -> Array:
    """h_BEN, float32."""
    return jnp.swapaxes(self.h_BNE, 1, 2)

  def final(self) -> Array:
    """h_BNE, float32."""
    return self.h_BNE

  def shared(self) -> Self:
    """See `StateSequence`."""
    return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LtiState(DiagonalState):
  """The state of time-invariant systems at one token; its query is of channels."""

  def read(self, query: Array) -> Array:
    """c_EN -> y_BE."""
    return reference.lti_read(self.h_BNE, query)

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """c_EN -> y_BE."""
    return jnp.einsum("ben,en->be", function(self.materialize(), inputs), query)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixState(ReadApart):
  """A matrix state at one token of decoding."""

  h_BHPN: Array

  def read(self, query: Array) -> Array:
    """q_BJN -> y_BHP."""
    return reference.matrix_read(self.h_BHPN, query)

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """q_BJN -> y_BHP."""
    return reference.matrix_read(function(self.h_BHPN, inputs), query)

  def plus(self, h: Array) -> Self:
    """See `TokenState`."""
    return dataclasses.replace(self, h_BHPN=self.h_BHPN + h)

  def materialize(self) -> Array:
    """h_BHPN, float32."""
    return self.h_BHPN

  def final(self) -> Array:
    """h_BHPN, float32."""
    return self.h_BHPN

  def shared(self) -> Self:
    """See `StateSequence`."""
    return self
