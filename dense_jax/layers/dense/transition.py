"""The selective transition phi: a map of a shallower layer's states for the layer that reads them.

    phi(h) = g_E * g_N * W h

The gates are functions of the reading layer's input. If W is linear, reading phi(h) with a query
is reading h with another query, so no states are stored.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.dense.gate import make_gates, of_source
from dense_jax.layers.linear import normal, parameter
from dense_jax.ops.recurrence import FLOAT32, Read, ReadGate, Recurrence, gate_value
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class ReadShape:
  """The number and shape of a layer's reads of shallower layers' states.

  Attributes:
    sources: S, the layers that are read.
    query: trailing shape of the mixer's query, (N,) or (J, N).
    channels: E, the width of a read.
    fixed_query: true if the query is a parameter [E, N] instead of a function of the token.
  """

  sources: int
  query: tuple[int, ...]
  channels: int
  fixed_query: bool


def project_query(query_N: Array, matrix: Array) -> Array:
  """Returns W^T q: [..., N] with W [N, N], or [..., J, N] with one W for each group of heads."""
  rule = "...jn,jnm->...jm" if matrix.ndim == 3 else "...n,nm->...m"
  return jnp.einsum(rule, query_N, matrix.astype(query_N.dtype))


def identity_matrices(rngs: nnx.Rngs, count: int, query: tuple[int, ...]) -> nnx.Param:
  """Makes `count` identity maps over the state axis, for queries of trailing shape `query`.

  Every device has all of them: they are small, and a mesh need not divide the number of groups.
  """
  return parameter(
      rngs, (count, *query, query[-1]), (None,) * (len(query) + 2),
      lambda _, shape: jnp.broadcast_to(jnp.eye(shape[-1], dtype=jnp.float32), shape),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
  """The map g_N * W h of one token's states.

  Attributes:
    matrix: a linear W, [N, N] or [J, N, N]; None means the identity.
    low_rank: V [N, R] and U [R, N] of the nonlinear W h = h + U silu(V h); None means a linear W.
  """

  matrix: Array | None
  low_rank: tuple[Array, Array] | None

  def __call__(self, h_N: Array, gate_N: Array | None) -> Array:
    """Maps one token's states [B, ..., N] to the same shape; `gate_N` is [B, N]."""
    if self.matrix is not None and self.matrix.ndim == 3:
      matrix_HNN = jnp.repeat(self.matrix, h_N.shape[1] // self.matrix.shape[0], axis=0)
      h_N = jnp.einsum("bhpm,hnm->bhpn", h_N, matrix_HNN)
    elif self.matrix is not None:
      h_N = jnp.einsum("...m,nm->...n", h_N, self.matrix)
    if self.low_rank is not None:
      down_NR, up_RN = self.low_rank
      h_N = h_N + jnp.dot(jax.nn.silu(jnp.dot(h_N, down_NR)), up_RN)
    if gate_N is not None:
      shape = (gate_N.shape[0], *(1,) * (h_N.ndim - 2), -1)
      h_N = h_N * gate_N.astype(h_N.dtype).reshape(shape)
    return h_N


def gate_states(gate_E: Array | None, h_EN: Array) -> Array:
  """Multiplies states [..., E, N] or [..., H, P, N] by a gate of channels [..., E]; float32."""
  h_EN = h_EN.astype(jnp.float32)
  if gate_E is None:
    return h_EN
  return gate_E.astype(jnp.float32).reshape(*h_EN.shape[:-1], 1) * h_EN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Phi:
  """The transition phi of one source, with its gates at the tokens of a call.

  Attributes:
    gate_E: the gate of channels, [..., E]; None means 1.
    gate_N: the gate of the state axis, [..., N]; None means 1.
    projection: W.
    fixed_query: true if the family's query is a parameter [E, N].
  """

  gate_E: ReadGate
  gate_N: Array | None
  projection: Projection
  fixed_query: bool = dataclasses.field(metadata={"static": True})

  def as_read(
      self, source: Recurrence, query: Array, *, dtype: jnp.dtype = FLOAT32,
      recompute: bool = False,
  ) -> Read:
    """Returns the read of phi(h) with a query; `dtype` and `recompute` are those of `Read`.

    The read uses another query of h if there is an equivalent one. Otherwise it maps the states
    token by token: if W is not linear, or if g_N depends on the token and the query does not.
    """
    matrix, gate_N = self.projection.matrix, self.gate_N
    if self.projection.low_rank is not None or (gate_N is not None and self.fixed_query):
      return Read(
          source, query, self.gate_E, gate_N, self.projection, dtype=dtype, recompute=recompute
      )
    if gate_N is not None:
      between = (1,) * (query.ndim - gate_N.ndim)
      query = query * gate_N.reshape(*gate_N.shape[:-1], *between, -1)
    if matrix is not None:
      query = project_query(query, matrix)
    return Read(source, query, self.gate_E, dtype=dtype, recompute=recompute)

  def __call__(self, h_EN: Array) -> Array:
    """Returns phi(h) of one token's states, [B, E, N] or [B, H, P, N]; float32."""
    return gate_states(gate_value(self.gate_E), self.projection(h_EN, self.gate_N))


class Transition(nnx.Module):
  """The parameters of phi for all sources of a layer.

  Args:
    config: the model.
    reads: the number and shape of reads.
  """

  def __init__(self, config: ModelConfig, reads: ReadShape, rngs: nnx.Rngs) -> None:
    dense, state_size = config.dense, reads.query[-1]
    self.projection, self.fixed_query = dense.transition, reads.fixed_query
    self.sources = reads.sources
    if dense.gate != "none":
      self.channel_gates = make_gates(config, reads.sources, reads.channels, "inner", rngs)
    if dense.gate == "channel_state":
      self.state_gates = make_gates(config, reads.sources, state_size, None, rngs)
    if self.projection == "linear":
      self.linear = identity_matrices(rngs, reads.sources, reads.query)
    elif self.projection == "mlp":
      rank = dense.transition_rank
      self.down = parameter(
          rngs, (reads.sources, state_size, rank), (None, None, None), normal(state_size**-0.5)
      )
      self.up = parameter(
          rngs, (reads.sources, rank, state_size), (None, None, None),
          lambda _, shape: jnp.zeros(shape),
      )

  def __call__(self, x_D: Array) -> list[Phi]:
    """Returns phi of each source, nearest first, for the layer's input [..., D].

    Sources that share a gate have the same object, so that a kernel computes it once.
    """
    gates_E = [gate.low_rank(x_D) for gate in getattr(self, "channel_gates", ())]
    # Around one, because if both gates started at zero, neither would learn.
    gates_N = [1 + gate(x_D) for gate in getattr(self, "state_gates", ())]
    phis = []
    for source in range(self.sources):
      matrix = low_rank = None
      if self.projection == "linear":
        matrix = self.linear[...][source]
      elif self.projection == "mlp":
        low_rank = self.down[...][source], self.up[...][source]
      phis.append(Phi(
          of_source(gates_E, source) if gates_E else None,
          of_source(gates_N, source) if gates_N else None,
          Projection(matrix, low_rank), self.fixed_query,
      ))
    return phis
