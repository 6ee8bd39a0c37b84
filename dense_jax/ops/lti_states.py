"""States of time-invariant systems over whole sequences, as deeper layers read them."""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp

from dense_jax.batch import Segments
from dense_jax.ops import reference, sequence_parallel
from dense_jax.ops.lti import System
from dense_jax.ops.lti_scan import fft_convolution, lti_read, lti_states
from dense_jax.ops.state_sequence import Mapped, ReadApart
from dense_jax.ops.token_scan import token_scan
from dense_jax.ops.token_states import LtiState
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LtiStates(ReadApart):
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

  def shared(self) -> Self:
    """See `StateSequence`."""
    return self


def scan_lti(
    system: System,
    x_BTE: Array,
    segments: Segments,
    initial_BNE: Array | None,
    *,
    implementation: str,
    chunk: int,
) -> LtiStates:
  """The states of time-invariant systems; reading them runs or convolves.

  Args:
    system: the discretised systems.
    x_BTE: inputs.
    segments: the documents.
    initial_BNE: float32 state before the first token; None is zero.
    implementation: what the resolver gives.
    chunk: tokens a chunk; 0 takes the form's own.
  """
  resets_BT = segments.resets_BT
  states = LtiStates(
      system, x_BTE, resets_BT, segments.valid_BT, initial_BNE, implementation, chunk
  )
  if sequence_parallel.shards() == 1:
    return states
  initial_BNE = sequence_parallel.lti_before(
      system, x_BTE, resets_BT, states._initial(), chunk=chunk
  )
  return dataclasses.replace(states, initial_BNE=initial_BNE)
