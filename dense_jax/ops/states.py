"""StateSequence: what a mixer's recurrence leaves behind for deeper layers to read.

A deeper layer asks a shallow layer's states a question of its own (a query) and gets the
answer of equation (2) without the states ever being stored: the recurrence's inputs are
kept and read again. That identity is what makes dense state connections affordable.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from dense_jax.ops import reference
from dense_jax.ops.chunked_linear import chunk_read, chunk_states
from dense_jax.ops.selective_scan import selective_scan
from dense_jax.types import Array, Segments


class StateSequence(Protocol):
  """The states of one layer, over a sequence or (in decoding) at one token."""

  def read(self, query: Array) -> Array:
    """Equation (2) with any query; float32."""

  def materialize(self) -> Array:
    """The states themselves; for tests and analysis, never for training."""

  def final(self) -> Array:
    """The state after the last token, to carry on from."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalStates:
  """Diagonal states h_BTNE, as the inputs that make them."""

  dt_BTE: Array
  a_NE: Array
  x_BTE: Array
  b_BTN: Array
  resets_BT: Array | None
  initial_BNE: Array
  final_BNE: Array
  implementation: str = dataclasses.field(metadata={"static": True})
  chunk: int = dataclasses.field(metadata={"static": True})

  def read(self, query: Array) -> Array:
    """c_BTN -> y_BTE."""
    y_BTE, _ = selective_scan(
        self.dt_BTE, self.a_NE, self.x_BTE, self.b_BTN, query, self.resets_BT,
        self.initial_BNE, implementation=self.implementation, chunk=self.chunk,
    )
    return y_BTE

  def materialize(self) -> Array:
    """h_BTNE, float32."""
    states, _ = reference.diagonal_states(
        self.dt_BTE, self.a_NE, self.x_BTE, self.b_BTN, self.resets_BT, self.initial_BNE
    )
    return states

  def final(self) -> Array:
    """h_BNE, float32."""
    return self.final_BNE


def scan_diagonal(
    dt_BTE: Array,
    a_NE: Array,
    x_BTE: Array,
    b_BTN: Array,
    c_BTN: Array,
    segments: Segments,
    initial_BNE: Array,
    *,
    implementation: str,
    chunk: int,
) -> tuple[Array, DiagonalStates]:
  """Runs the selective recurrence (arguments as `selective_scan`'s).

  Returns:
    The own read y_BTE, float32, and the states for deeper layers.
  """
  resets_BT, valid_BT = segments.resets_BT, segments.valid_BT
  if valid_BT is not None:
    dt_BTE = jnp.where(valid_BT[..., None], dt_BTE, 0)
  y_BTE, final_BNE = selective_scan(
      dt_BTE, a_NE, x_BTE, b_BTN, c_BTN, resets_BT, initial_BNE,
      implementation=implementation, chunk=chunk,
  )
  states = DiagonalStates(
      dt_BTE, a_NE, x_BTE, b_BTN, resets_BT, initial_BNE, final_BNE, implementation, chunk
  )
  return y_BTE, states


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixStates:
  """Matrix states h_BTHPN, as the inputs that make them and the states between chunks."""

  k_BTHN: Array
  v_BTHP: Array
  log_decay_BTH: Array
  resets_BT: Array | None
  initial_BHPN: Array
  before_BGHPN: Array | None
  final_BHPN: Array
  chunk: int = dataclasses.field(metadata={"static": True})

  def read(self, query: Array) -> Array:
    """q_BTHN -> y_BTHP."""
    if self.before_BGHPN is None:
      return jnp.einsum("bthpn,bthn->bthp", self.materialize(), query.astype(jnp.float32))
    return chunk_read(
        query, self.k_BTHN, self.v_BTHP, self.log_decay_BTH, self.resets_BT,
        self.before_BGHPN, chunk=self.chunk,
    )

  def materialize(self) -> Array:
    """h_BTHPN, float32."""
    states, _ = reference.matrix_states(
        self.k_BTHN, self.v_BTHP, self.log_decay_BTH, self.resets_BT, self.initial_BHPN
    )
    return states

  def final(self) -> Array:
    """h_BHPN, float32."""
    return self.final_BHPN


def scan_matrix(
    k_BTHN: Array,
    v_BTHP: Array,
    log_decay_BTH: Array,
    segments: Segments,
    initial_BHPN: Array,
    *,
    implementation: str,
    chunk: int,
) -> MatrixStates:
  """Runs a matrix-state recurrence (arguments as `chunk_states`'s, or "recurrent")."""
  resets_BT, valid_BT = segments.resets_BT, segments.valid_BT
  if valid_BT is not None:
    log_decay_BTH = jnp.where(valid_BT[..., None], log_decay_BTH, 0)
    k_BTHN = jnp.where(valid_BT[..., None, None], k_BTHN, 0)
  before_BGHPN = None
  if implementation == "recurrent":
    _, final_BHPN = reference.matrix_states(
        k_BTHN, v_BTHP, log_decay_BTH, resets_BT, initial_BHPN
    )
  else:
    before_BGHPN, final_BHPN = chunk_states(
        k_BTHN, v_BTHP, log_decay_BTH, resets_BT, initial_BHPN,
        implementation=implementation, chunk=chunk,
    )
  return MatrixStates(
      k_BTHN, v_BTHP, log_decay_BTH, resets_BT, initial_BHPN, before_BGHPN, final_BHPN, chunk
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalState:
  """A diagonal state at one token of decoding."""

  h_BNE: Array

  def read(self, query: Array) -> Array:
    """c_BN -> y_BE."""
    return reference.diagonal_read(self.h_BNE, query)

  def materialize(self) -> Array:
    """h_BNE, float32."""
    return self.h_BNE

  def final(self) -> Array:
    """h_BNE, float32."""
    return self.h_BNE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixState:
  """A matrix state at one token of decoding."""

  h_BHPN: Array

  def read(self, query: Array) -> Array:
    """q_BHN -> y_BHP."""
    return reference.matrix_read(self.h_BHPN, query)

  def materialize(self) -> Array:
    """h_BHPN, float32."""
    return self.h_BHPN

  def final(self) -> Array:
    """h_BHPN, float32."""
    return self.h_BHPN
