"""Recurrences of time-invariant systems over whole sequences."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dense_jax.ops.lti.chunked import lti_chunk_read, lti_chunk_states
from dense_jax.ops.lti.convolution import fft_convolution
from dense_jax.ops.lti.reference import lti_read, lti_states
from dense_jax.ops.lti.system import System
from dense_jax.ops.lti.token import LtiToken
from dense_jax.ops.recurrence import ScannedRecurrence, StateMap
from dense_jax.ops.token_scan import token_scan
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LtiSequence(ScannedRecurrence):
  """States h_BTNE of time-invariant systems, represented by the systems and their inputs.

  The base class of the implementations, which give `_scan`: c_EN -> y_BTE, h_BNE.

  Attributes:
    system: the discretised systems, one per channel.
    x_BTE: inputs.
    resets_BT: bool, true where the state is cleared before the token; None means never.
    valid_BT: bool, false at padding; None means no padding.
    initial_BNE: float32 state before the first token; None means zero.
    chunk: tokens per chunk; 0 means the implementation's default.
  """

  system: System
  x_BTE: Array
  resets_BT: Array | None
  valid_BT: Array | None
  initial_BNE: Array | None
  chunk: int = dataclasses.field(metadata={"static": True})

  def before_first(self) -> Array:
    """Returns the state before the first token, h_BNE."""
    if self.initial_BNE is not None:
      return self.initial_BNE
    batch, _, width = self.x_BTE.shape
    return jnp.zeros((batch, self.system.b_NE.shape[0], width), jnp.float32)

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """See `Recurrence`: c_EN -> y_BTE."""
    return self._by_token(
        lambda h_BNE, token: LtiToken(h_BNE).read_mapped(query, function, token), inputs
    )[0]

  def _by_token(
      self, read: Callable[[Array, PyTree], Array], queries: PyTree
  ) -> tuple[Array, Array]:
    valid_BT = self.valid_BT
    if valid_BT is None:  # `token_scan` needs it: zero inputs change the state.
      valid_BT = jnp.ones(self.x_BTE.shape[:2], bool)
    return token_scan(
        self.system.stepper(), read, self.before_first(), (self.x_BTE,), queries, self.resets_BT,
        valid_BT, chunk=self.chunk,
    )

  def materialize(self) -> Array:
    """See `Recurrence`: h_BTEN, float32."""
    states, _ = lti_states(
        *self.system.dense(), self.x_BTE, self.resets_BT, self.before_first()
    )
    return jnp.swapaxes(states, 2, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentLti(LtiSequence):
  """Runs token by token, with `jax.lax.scan` inside rematerialised chunks."""

  def _scan(self, c_EN: Array) -> tuple[Array, Array]:
    return self._by_token(lambda h_BNE, _: lti_read(h_BNE, c_EN), None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedLti(LtiSequence):
  """Runs matmuls over chunks, and a `jax.lax.scan` over the states between chunks."""

  def _chunk_states(self) -> tuple[Array, Array]:
    """Computes the states before each chunk and after the last, h_BGNE and h_BNE."""
    return lti_chunk_states(
        self.system, self.x_BTE, self.resets_BT, self.valid_BT, self.before_first(),
        chunk=self.chunk,
    )

  def _scan(self, c_EN: Array) -> tuple[Array, Array]:
    before_BGNE, final_BNE = self._chunk_states()
    y_BTE = lti_chunk_read(
        self.system, c_EN, self.x_BTE, self.resets_BT, before_BGNE, chunk=self.chunk
    )
    return y_BTE, final_BNE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvolvedLti(ChunkedLti):
  """Runs one convolution by FFT over rows that are one document each, from its beginning.

  Rows that hold several documents or begin with a carried state run as in `ChunkedLti`.
  """

  def _scan(self, c_EN: Array) -> tuple[Array, Array]:
    if self.initial_BNE is not None or self.resets_BT is not None:
      return super()._scan(c_EN)
    kernel_TE = self.system.kernel(c_EN, self.x_BTE.shape[1])
    return fft_convolution(self.x_BTE, kernel_TE), self._chunk_states()[1]
