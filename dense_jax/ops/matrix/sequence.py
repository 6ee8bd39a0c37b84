"""Recurrences with matrix states over whole sequences."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from dense_jax.ops.matrix.chunked import chunk_read, chunk_states
from dense_jax.ops.matrix.reference import matrix_read, matrix_states, matrix_step
from dense_jax.ops.matrix.token import MatrixToken
from dense_jax.ops.recurrence import ScannedRecurrence, StateMap
from dense_jax.ops.token_scan import token_scan
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixSequence(ScannedRecurrence):
  """States h_BTHPN of a matrix-state recurrence, represented by its inputs.

  The base class of the implementations, which give `_scan`: q_BTJN -> y_BTHP, h_BHPN.

  Attributes:
    k_BTJN: keys, zero at padding; head h uses those of group h // (H / J).
    v_BTE: values, in the keys' dtype. Their heads' axis is not apart: in arrays [..., H, P] with
      small H or P, tiles of a TPU's memory would be mostly padding.
    scale_BTH: float32 factor of the values, such as a step size; None means 1.
    log_decay_BTH: float32, <= 0, zero at padding; its B may be 1 (a decay that all rows share).
    resets_BT: bool, true where the state is cleared before the token; None means never.
    initial_BHPN: float32 state before the first token; None means zero.
    chunk: tokens per chunk; 0 means the implementation's default.
    equal_decays: true if every layer of the model has these decays. Then the sum of several layers'
      states is one recurrence too, and kernels read it as one.
  """

  k_BTJN: Array
  v_BTE: Array
  scale_BTH: Array | None
  log_decay_BTH: Array
  resets_BT: Array | None
  initial_BHPN: Array | None
  chunk: int = dataclasses.field(metadata={"static": True})
  equal_decays: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def v_BTHP(self) -> Array:
    """The values of each head."""
    return self.v_BTE.reshape(*self.v_BTE.shape[:2], self.log_decay_BTH.shape[2], -1)

  def scaled_BTHP(self) -> Array:
    """Computes scale * v, rounded to the dtype of v."""
    if self.scale_BTH is None:
      return self.v_BTHP
    return (self.scale_BTH[..., None] * self.v_BTHP).astype(self.v_BTHP.dtype)

  def before_first(self) -> Array:
    """Returns the state before the first token, h_BHPN."""
    if self.initial_BHPN is not None:
      return self.initial_BHPN
    batch, _, heads, channels = self.v_BTHP.shape
    return jnp.zeros((batch, heads, channels, self.k_BTJN.shape[-1]), jnp.float32)

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """See `Recurrence`: q_BTJN -> y_BTHP."""

    def read(h_BHPN: Array, token: PyTree) -> Array:
      return MatrixToken(h_BHPN).read_mapped(token[0], function, token[1])

    return self._by_token(read, (query, inputs))[0]

  def _by_token(
      self, read: Callable[[Array, PyTree], Array], queries: PyTree
  ) -> tuple[Array, Array]:
    def step(h_BHPN: Array, k_BJN: Array, v_BHP: Array, log_decay_BH: Array) -> Array:
      return matrix_step(h_BHPN, log_decay_BH, k_BJN, v_BHP)

    return token_scan(
        step, read, self.before_first(), (self.k_BTJN, self.scaled_BTHP(), self.log_decay_BTH),
        queries, self.resets_BT, chunk=self.chunk,
    )

  def materialize(self) -> Array:
    """See `Recurrence`: h_BTHPN, float32."""
    states, _ = matrix_states(
        self.k_BTJN, self.scaled_BTHP(), self.log_decay_BTH, self.resets_BT, self.before_first()
    )
    return states


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentMatrix(MatrixSequence):
  """Runs token by token, with `jax.lax.scan` inside rematerialised chunks."""

  def _scan(self, q_BTJN: Array) -> tuple[Array, Array]:
    return self._by_token(matrix_read, q_BTJN)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedMatrix(MatrixSequence):
  """Runs matmuls over chunks, and a `jax.lax.scan` over the states between chunks."""

  associative: ClassVar[bool] = False

  def _scan(self, q_BTJN: Array) -> tuple[Array, Array]:
    v_BTHP = self.scaled_BTHP()
    before_BGHPN, final_BHPN = chunk_states(
        self.k_BTJN, v_BTHP, self.log_decay_BTH, self.resets_BT, self.before_first(),
        associative=self.associative, chunk=self.chunk,
    )
    y_BTHP = chunk_read(
        q_BTJN, self.k_BTJN, v_BTHP, self.log_decay_BTH, self.resets_BT, before_BGHPN,
        chunk=self.chunk,
    )
    return y_BTHP, final_BHPN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AssociativeMatrix(ChunkedMatrix):
  """Runs matmuls over chunks, and a `jax.lax.associative_scan` over the states between them."""

  associative: ClassVar[bool] = True
