"""Recurrences with diagonal states over whole sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dense_jax.ops.diagonal.chunked import associative_scan, token_by_token
from dense_jax.ops.diagonal.reference import diagonal_states, diagonal_step
from dense_jax.ops.diagonal.step_sizes import StepSizes
from dense_jax.ops.diagonal.token import DiagonalToken
from dense_jax.ops.recurrence import ScannedRecurrence, StateMap
from dense_jax.ops.token_scan import token_scan
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalSequence(ScannedRecurrence):
  """States h_BTNE of the selective recurrence, represented by its inputs.

  The base class of the implementations, which give `_scan`: c_BTN -> y_BTE, h_BNE.

  Attributes:
    dt: step sizes dt_BTE >= 0, zero at padding; or a `StepSizes`, from which each read computes
      them again.
    a_NE: float32 decay rates <= 0.
    x_BTE: inputs.
    b_BTN: input maps.
    resets_BT: bool, true where the state is cleared before the token; None means never.
    initial_BNE: float32 state before the first token; None means zero.
    chunk: tokens per chunk; 0 means the implementation's default.
  """

  dt: Array | StepSizes
  a_NE: Array
  x_BTE: Array
  b_BTN: Array
  resets_BT: Array | None
  initial_BNE: Array | None
  chunk: int = dataclasses.field(metadata={"static": True})

  def dt_BTE(self) -> Array:
    """Computes the step sizes."""
    return self.dt.dt() if isinstance(self.dt, StepSizes) else self.dt

  def before_first(self) -> Array:
    """Returns the state before the first token, h_BNE."""
    if self.initial_BNE is not None:
      return self.initial_BNE
    return jnp.zeros((self.x_BTE.shape[0], *self.a_NE.shape), jnp.float32)

  def after_last(self) -> Array:
    """Computes the state after the last token, h_BNE, without any read."""
    return associative_scan(
        self.dt_BTE(), self.a_NE, self.x_BTE, self.b_BTN, None, self.resets_BT,
        self.before_first(), chunk=self.chunk,
    )[1]

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """See `Recurrence`: c_BTN -> y_BTE."""

    def read(h_BNE: Array, token: PyTree) -> Array:
      return DiagonalToken(h_BNE).read_mapped(token[0], function, token[1])

    y_BTE, _ = token_scan(
        functools.partial(diagonal_step, self.a_NE[None]), read, self.before_first(),
        (self.dt_BTE(), self.x_BTE, self.b_BTN), (query, inputs), self.resets_BT,
        chunk=self.chunk,
    )
    return y_BTE

  def materialize(self) -> Array:
    """See `Recurrence`: h_BTEN, float32."""
    states, _ = diagonal_states(
        self.dt_BTE(), self.a_NE, self.x_BTE, self.b_BTN, self.resets_BT, self.before_first()
    )
    return jnp.swapaxes(states, 2, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AssociativeDiagonal(DiagonalSequence):
  """Runs `jax.lax.associative_scan` inside rematerialised chunks."""

  def _scan(self, c_BTN: Array) -> tuple[Array, Array]:
    return associative_scan(
        self.dt_BTE(), self.a_NE, self.x_BTE, self.b_BTN, c_BTN, self.resets_BT,
        self.before_first(), chunk=self.chunk,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentDiagonal(DiagonalSequence):
  """Runs token by token, with `jax.lax.scan` inside rematerialised chunks."""

  def _scan(self, c_BTN: Array) -> tuple[Array, Array]:
    return token_by_token(
        self.dt_BTE(), self.a_NE[None], self.x_BTE, self.b_BTN, c_BTN, self.resets_BT,
        self.before_first(), chunk=self.chunk,
    )

  def after_last(self) -> Array:
    """See `DiagonalSequence`."""
    return token_by_token(
        self.dt_BTE(), self.a_NE[None], self.x_BTE, self.b_BTN, None, self.resets_BT,
        self.before_first(), chunk=self.chunk,
    )[1]
