"""Diagonal and matrix states of whole sequences, as deeper layers read them.

A deeper layer asks a shallow layer's states a question of its own (a query) and gets the
answer of equation (2) without the states ever being stored: the recurrence's inputs are
kept and read again. That identity is what makes dense state connections affordable.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Self, cast

import jax
import jax.numpy as jnp

from dense_jax.batch import Segments
from dense_jax.ops import dispatch, reference, sequence_parallel
from dense_jax.ops.chunked_linear import chunk_read, chunk_states
from dense_jax.ops.pallas.chunked_linear import Matrix
from dense_jax.ops.pallas.partition import read_diagonal, read_matrix
from dense_jax.ops.pallas.selective_scan import Diagonal
from dense_jax.ops.selective_scan import StepSizes, selective_scan
from dense_jax.ops.state_sequence import GatedRead, Mapped
from dense_jax.ops.token_scan import token_scan
from dense_jax.ops.token_states import DiagonalState, MatrixState
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalStates:
  """Diagonal states h_BTNE, as the inputs that make them.

  Step sizes that have a low rank are kept as that, and made again for each read.
  """

  dt: Array | StepSizes
  a_NE: Array
  x_BTE: Array
  b_BTN: Array
  resets_BT: Array | None
  initial_BNE: Array | None
  final_BNE: Array | None
  implementation: str = dataclasses.field(metadata={"static": True})
  chunk: int = dataclasses.field(metadata={"static": True})

  def _dt(self) -> Array:
    return self.dt.dt() if isinstance(self.dt, StepSizes) else self.dt

  def _initial(self) -> Array:
    if self.initial_BNE is not None:
      return self.initial_BNE
    return jnp.zeros((self.x_BTE.shape[0], *self.a_NE.shape), jnp.float32)

  @property
  def joint(self) -> bool:
    """See `StateSequence`."""
    return self.implementation in dispatch.KERNELS

  def _asked(self, query: Array, gate: Array | None) -> Diagonal:
    """This recurrence and a question, as the kernel takes them."""
    if gate is not None:
      gate = gate.astype(jnp.float32).reshape(self.x_BTE.shape)
    return Diagonal(
        self._dt(), self.a_NE, self.x_BTE, self.b_BTN, query, gate, self._initial()
    )

  def read_with(self, query: Array, others: Sequence[GatedRead] = ()) -> tuple[Array, Self]:
    """c_BTN -> y_BTE."""
    if self.joint:
      asked = [
          cast(DiagonalStates, other.states)._asked(other.query, other.gate) for other in others
      ]
      y_BTE, final_BNE = read_diagonal(
          [self._asked(query, None), *asked], self.resets_BT, chunk=self.chunk,
          interpret=self.implementation == dispatch.INTERPRETED,
      )
    else:
      assert not others
      y_BTE, final_BNE = selective_scan(
          self._dt(), self.a_NE, self.x_BTE, self.b_BTN, query, self.resets_BT,
          self._initial(), implementation=self.implementation, chunk=self.chunk,
      )
    return y_BTE, dataclasses.replace(self, final_BNE=final_BNE)

  def read(self, query: Array) -> Array:
    """c_BTN -> y_BTE."""
    return self.read_with(query)[0]

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """c_BTN -> y_BTE."""

    def read(h_BNE: Array, token: PyTree) -> Array:
      return DiagonalState(h_BNE).read_mapped(token[0], function, token[1])

    y_BTE, _ = token_scan(
        functools.partial(reference.diagonal_step, self.a_NE[None]), read, self._initial(),
        (self._dt(), self.x_BTE, self.b_BTN), (query, inputs), self.resets_BT, chunk=self.chunk,
    )
    return y_BTE

  def materialize(self) -> Array:
    """h_BTEN, float32."""
    states, _ = reference.diagonal_states(
        self._dt(), self.a_NE, self.x_BTE, self.b_BTN, self.resets_BT, self._initial()
    )
    return jnp.swapaxes(states, 2, 3)

  def final(self) -> Array:
    """h_BNE, float32; at hand once the layer itself has read its states."""
    if self.final_BNE is None:
      return self.read_with(self.b_BTN)[1].final()
    return self.final_BNE

  def shared(self) -> Self:
    """See `StateSequence`."""
    return dataclasses.replace(self, final_BNE=None)


def scan_diagonal(
    dt: Array | StepSizes,
    a_NE: Array,
    x_BTE: Array,
    b_BTN: Array,
    segments: Segments,
    initial_BNE: Array | None,
    *,
    implementation: str,
    chunk: int,
) -> DiagonalStates:
  """The states of the selective recurrence; reading them runs it.

  Args:
    dt: step sizes dt_BTE >= 0, or what they are made from.
    a_NE: float32 decay rates <= 0.
    x_BTE: inputs.
    b_BTN: input maps.
    segments: the documents.
    initial_BNE: float32 state before the first token; None is zero.
    implementation: what the resolver gives.
    chunk: tokens a chunk; 0 takes the form's own.
  """
  resets_BT, valid_BT = segments.resets_BT, segments.valid_BT
  if valid_BT is not None:
    if isinstance(dt, StepSizes):
      dt = dataclasses.replace(dt, valid_BT=valid_BT)
    else:
      dt = jnp.where(valid_BT[..., None], dt, 0)
  states = DiagonalStates(
      dt, a_NE, x_BTE, b_BTN, resets_BT, initial_BNE, None, implementation, chunk
  )
  if sequence_parallel.shards() == 1:
    return states
  initial_BNE = sequence_parallel.diagonal_before(
      states._dt(), a_NE, x_BTE, b_BTN, resets_BT, states._initial(),
      implementation="recurrent" if implementation == "recurrent" else "associative", chunk=chunk,
  )
  return dataclasses.replace(states, initial_BNE=initial_BNE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixStates:
  """Matrix states h_BTHPN, as the inputs that make them.

  The layer itself also has `before_BGHPN`, the states between chunks, and `final_BHPN`.
  Deeper layers make the former again: carried along, they would be most of what dense
  connections cost in memory.
  """

  k_BTJN: Array
  v_BTHP: Array
  log_decay_BTH: Array
  resets_BT: Array | None
  initial_BHPN: Array | None
  before_BGHPN: Array | None
  final_BHPN: Array | None
  implementation: str = dataclasses.field(metadata={"static": True})
  chunk: int = dataclasses.field(metadata={"static": True})

  def _initial(self) -> Array:
    if self.initial_BHPN is not None:
      return self.initial_BHPN
    batch, _, heads, channels = self.v_BTHP.shape
    return jnp.zeros((batch, heads, channels, self.k_BTJN.shape[-1]), jnp.float32)

  @property
  def joint(self) -> bool:
    """See `StateSequence`."""
    return self.implementation in dispatch.KERNELS

  def between_chunks(self) -> tuple[Array, Array]:
    """before_BGHPN and final_BHPN."""
    return chunk_states(
        self.k_BTJN, self.v_BTHP, self.log_decay_BTH, self.resets_BT, self._initial(),
        implementation=self.implementation, chunk=self.chunk,
    )

  def _asked(self, query: Array, gate: Array | None) -> Matrix:
    """This recurrence and a question, as the kernel takes them."""
    if gate is not None:
      gate = gate.astype(jnp.float32).reshape(self.v_BTHP.shape)
    return Matrix(
        query, self.k_BTJN, self.v_BTHP, self.log_decay_BTH, gate, self._initial()
    )

  def read_with(self, query: Array, others: Sequence[GatedRead] = ()) -> tuple[Array, Self]:
    """q_BTJN -> y_BTHP."""
    if not self.joint:
      assert not others
      return self.read(query), self
    asked = [cast(MatrixStates, other.states)._asked(other.query, other.gate) for other in others]
    y_BTHP, final_BHPN = read_matrix(
        [self._asked(query, None), *asked], self.resets_BT, chunk=self.chunk,
        interpret=self.implementation == dispatch.INTERPRETED,
    )
    return y_BTHP, dataclasses.replace(self, final_BHPN=final_BHPN)

  def read(self, query: Array) -> Array:
    """q_BTJN -> y_BTHP."""
    if self.joint:
      return self.read_with(query)[0]
    if self.implementation == "recurrent":
      return self.read_mapped(query, lambda h, _: h, None)
    before_BGHPN = self.before_BGHPN
    if before_BGHPN is None:
      before_BGHPN, _ = self.between_chunks()
    return chunk_read(
        query, self.k_BTJN, self.v_BTHP, self.log_decay_BTH, self.resets_BT, before_BGHPN,
        chunk=self.chunk,
    )

  def read_mapped(self, query: Array, function: Mapped, inputs: PyTree) -> Array:
    """q_BTJN -> y_BTHP."""

    def read(h_BHPN: Array, token: PyTree) -> Array:
      return MatrixState(h_BHPN).read_mapped(token[0], function, token[1])

    return self._tokens(read, (query, inputs))[0]

  def _tokens(self, read: Callable[[Array, PyTree], Array], queries: PyTree) -> tuple[Array, Array]:
    def step(h_BHPN: Array, k_BJN: Array, v_BHP: Array, log_decay_BH: Array) -> Array:
      return reference.matrix_step(h_BHPN, log_decay_BH, k_BJN, v_BHP)

    return token_scan(
        step, read, self._initial(), (self.k_BTJN, self.v_BTHP, self.log_decay_BTH), queries,
        self.resets_BT,
    )

  def materialize(self) -> Array:
    """h_BTHPN, float32."""
    states, _ = reference.matrix_states(
        self.k_BTJN, self.v_BTHP, self.log_decay_BTH, self.resets_BT, self._initial()
    )
    return states

  def final(self) -> Array:
    """h_BHPN, float32; only the layer itself has it at hand."""
    if self.final_BHPN is not None:
      return self.final_BHPN
    if self.joint:
      return self.read_with(self.k_BTJN)[1].final()
    if self.implementation == "recurrent":
      return self._tokens(lambda h_BHPN, _: h_BHPN[:, 0, 0, 0], None)[1]
    return self.between_chunks()[1]

  def shared(self) -> Self:
    """See `StateSequence`."""
    return dataclasses.replace(self, before_BGHPN=None, final_BHPN=None)


def scan_matrix(
    k_BTJN: Array,
    v_BTHP: Array,
    log_decay_BTH: Array,
    segments: Segments,
    initial_BHPN: Array | None,
    *,
    implementation: str,
    chunk: int,
) -> MatrixStates:
  """Runs a matrix-state recurrence.

  Args:
    k_BTJN: keys; head h takes those of group h // (H / J).
    v_BTHP: values, of the keys' dtype.
    log_decay_BTH: float32, <= 0; its B may be 1 (a decay that all rows share).
    segments: the documents.
    initial_BHPN: float32 state before the first token; None is zero.
    implementation: what the resolver gives.
    chunk: tokens a chunk; 0 takes the form's own.
  """
  resets_BT, valid_BT = segments.resets_BT, segments.valid_BT
  if valid_BT is not None:
    log_decay_BTH = jnp.where(valid_BT[..., None], log_decay_BTH, 0)
    k_BTJN = jnp.where(valid_BT[..., None, None], k_BTJN, 0)
  states = MatrixStates(
      k_BTJN, v_BTHP, log_decay_BTH, resets_BT, initial_BHPN, None, None, implementation, chunk
  )
  if sequence_parallel.shards() > 1:
    initial_BHPN = sequence_parallel.matrix_before(
        k_BTJN, v_BTHP, log_decay_BTH, resets_BT, states._initial(), chunk=chunk
    )
    states = dataclasses.replace(states, initial_BHPN=initial_BHPN)
  if implementation == "recurrent" or states.joint:
    return states
  before_BGHPN, final_BHPN = states.between_chunks()
  return dataclasses.replace(states, before_BGHPN=before_BGHPN, final_BHPN=final_BHPN)
