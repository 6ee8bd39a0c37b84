"""StateSequence: what a mixer's recurrence leaves behind for deeper layers to read.

A deeper layer asks a shallow layer's states a question of its own (a query) and gets the
answer of equation (2) without the states ever being stored: the recurrence's inputs are
kept and read again. That identity is what makes dense state connections affordable.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from dense_jax.ops import reference
from dense_jax.ops.chunked_linear import chunk_read, chunk_states
from dense_jax.ops.lti import System
from dense_jax.ops.lti_scan import fft_convolution, lti_read, lti_states
from dense_jax.ops.selective_scan import selective_scan
from dense_jax.ops.token_scan import token_scan
from dense_jax.types import Array, PyTree, Segments

Mapped = Callable[[Array, PyTree], Array]
"""A function of one token's states, N last, and of that token's part of some inputs."""


class StateSequence(Protocol):
  """The states of one layer, over a sequence or (in decoding) at one token."""

  def read(self, query: Array) -> Array:
    """Equation (2) with any query; float32."""

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """As `read`, of `function(states, inputs)` in place of the states.

    Token by token in rematerialised chunks: exact for any function, and far slower.

    Args:
      query: as of `read`.
      function: maps [B, ..., N] to the same shape.
      inputs: a tree of [B, T, ...] (in decoding [B, ...]), or None.
    """

  def materialize(self) -> Array:
    """The states themselves, N last; for tests and analysis, never for training."""

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

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """c_BTN -> y_BTE."""

    def step(h_BNE: Array, dt_BE: Array, x_BE: Array, b_BN: Array) -> Array:
      return reference.diagonal_step(h_BNE, dt_BE, self.a_NE, x_BE, b_BN)

    def read(h_BNE: Array, token: PyTree) -> Array:
      return DiagonalState(h_BNE).read_mapped(token[0], function, token[1])

    y_BTE, _ = token_scan(
        step, read, self.initial_BNE, (self.dt_BTE, self.x_BTE, self.b_BTN), (query, inputs),
        self.resets_BT, chunk=self.chunk,
    )
    return y_BTE

  def materialize(self) -> Array:
    """h_BTEN, float32."""
    states, _ = reference.diagonal_states(
        self.dt_BTE, self.a_NE, self.x_BTE, self.b_BTN, self.resets_BT, self.initial_BNE
    )
    return jnp.swapaxes(states, 2, 3)

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

  k_BTJN: Array
  v_BTHP: Array
  log_decay_BTH: Array
  resets_BT: Array | None
  initial_BHPN: Array
  before_BGHPN: Array | None
  final_BHPN: Array
  chunk: int = dataclasses.field(metadata={"static": True})

  def read(self, query: Array) -> Array:
    """q_BTJN -> y_BTHP."""
    if self.before_BGHPN is None:
      return self.read_mapped(query, lambda h, _: h, None)
    return chunk_read(
        query, self.k_BTJN, self.v_BTHP, self.log_decay_BTH, self.resets_BT,
        self.before_BGHPN, chunk=self.chunk,
    )

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """q_BTJN -> y_BTHP."""

    def step(h_BHPN: Array, k_BJN: Array, v_BHP: Array, log_decay_BH: Array) -> Array:
      return reference.matrix_step(h_BHPN, log_decay_BH, k_BJN, v_BHP)

    def read(h_BHPN: Array, token: PyTree) -> Array:
      return MatrixState(h_BHPN).read_mapped(token[0], function, token[1])

    y_BTHP, _ = token_scan(
        step, read, self.initial_BHPN, (self.k_BTJN, self.v_BTHP, self.log_decay_BTH),
        (query, inputs), self.resets_BT,
    )
    return y_BTHP

  def materialize(self) -> Array:
    """h_BTHPN, float32."""
    states, _ = reference.matrix_states(
        self.k_BTJN, self.v_BTHP, self.log_decay_BTH, self.resets_BT, self.initial_BHPN
    )
    return states

  def final(self) -> Array:
    """h_BHPN, float32."""
    return self.final_BHPN


def scan_matrix(
    k_BTJN: Array,
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
    k_BTJN = jnp.where(valid_BT[..., None, None], k_BTJN, 0)
  before_BGHPN = None
  if implementation == "recurrent":
    _, final_BHPN = reference.matrix_states(
        k_BTJN, v_BTHP, log_decay_BTH, resets_BT, initial_BHPN
    )
  else:
    before_BGHPN, final_BHPN = chunk_states(
        k_BTJN, v_BTHP, log_decay_BTH, resets_BT, initial_BHPN,
        implementation=implementation, chunk=chunk,
    )
  return MatrixStates(
      k_BTJN, v_BTHP, log_decay_BTH, resets_BT, initial_BHPN, before_BGHPN, final_BHPN, chunk
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LtiStates:
  """States h_BTNE of time-invariant systems, as the systems and their inputs.

  `initial_BNE` is None for rows that begin without a state: without resets too, their reads
  are convolutions, if the implementation is "conv". Else they take chunks.
  """

  system: System
  x_BTE: Array
  resets_BT: Array | None
  valid_BT: Array | None
  initial_BNE: Array | None
  implementation: str = dataclasses.field(metadata={"static": True})
  chunk: int = dataclasses.field(metadata={"static": True})

  def _initial(self) -> Array:
    if self.initial_BNE is not None:
      return self.initial_BNE
    batch, _, width = self.x_BTE.shape
    return jnp.zeros((batch, self.system.b_NE.shape[0], width), jnp.float32)

  def _chunks(self) -> tuple[Array, Array]:
    return lti_states(
        self.system, self.x_BTE, self.resets_BT, self.valid_BT, self._initial(), chunk=self.chunk
    )

  def _tokens(self, read: Callable[[Array, PyTree], Array], queries: PyTree) -> tuple[Array, Array]:
    return token_scan(
        self.system.stepper(), read, self._initial(), (self.x_BTE,), queries, self.resets_BT,
        jnp.ones(self.x_BTE.shape[:2], bool) if self.valid_BT is None else self.valid_BT,
    )

  def read(self, query: Array) -> Array:
    """c_EN -> y_BTE."""
    if self.implementation == "recurrent":
      return self._tokens(lambda h_BNE, _: reference.lti_read(h_BNE, query), None)[0]
    if self.implementation == "conv" and self.initial_BNE is None and self.resets_BT is None:
      return fft_convolution(self.x_BTE, self.system.kernel(query, self.x_BTE.shape[1]))
    before_BGNE, _ = self._chunks()
    return lti_read(
        self.system, query, self.x_BTE, self.resets_BT, before_BGNE, chunk=self.chunk
    )

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """c_EN -> y_BTE."""
    return self._tokens(
        lambda h_BNE, token: LtiState(h_BNE).read_mapped(query, function, token), inputs
    )[0]

  def materialize(self) -> Array:
    """h_BTEN, float32."""
    states, _ = reference.lti_states(
        *self.system.dense(), self.x_BTE, self.resets_BT, self._initial()
    )
    return jnp.swapaxes(states, 2, 3)

  def final(self) -> Array:
    """h_BNE, float32."""
    if self.implementation == "recurrent":
      return self._tokens(lambda h_BNE, _: h_BNE[:, 0], None)[1]
    return self._chunks()[1]


@runtime_checkable
class TokenState(StateSequence, Protocol):
  """A StateSequence at one token of decoding, where the states themselves are there."""

  def plus(self, h: Array) -> "TokenState":
    """The states plus others, N last."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalState:
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
class MatrixState:
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
