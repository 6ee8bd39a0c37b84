"""The selective transition phi: what a layer makes of a shallower layer's states.

    phi(h) = g_E * g_N * project(h)

with gates made from the reading layer's own input. Where the projection is linear, reading
phi(h) with a query is reading h with another query, so that no state is ever stored.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.linear import Linear, normal, parameter, xavier_uniform, zeros
from dense_jax.ops.state_sequence import StateSequence
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Reads:
  """What a layer reads of shallower layers' states.

  Attributes:
    sources: S, the layers that are read.
    query: trailing shape of the mixer's query, (N,) or (J, N).
    channels: E, the width of a read.
    fixed_query: the query is a parameter [E, N], not a function of the token.
  """

  sources: int
  query: tuple[int, ...]
  channels: int
  fixed_query: bool


class Gate(nnx.Module):
  """silu(silu(x W1) W2), from the layer's input (released DenseRetNet)."""

  def __init__(self, config: ModelConfig, width: int, axis: str | None, rngs: nnx.Rngs) -> None:
    rank = bottleneck(config)
    # Started at zero the gate is zero, yet it learns: silu has slope 1/2 there.
    last = zeros if config.dense.gate_init == "zeros" else xavier_uniform(2**-2.5)
    self.down = Linear(
        config.width, rank, axes=("embed", None), init=xavier_uniform(2**-2.5), rngs=rngs
    )
    self.up = Linear(rank, width, axes=(None, axis), init=last, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """[..., D] -> [..., width]."""
    return jax.nn.silu(self.up(jax.nn.silu(self.down(x))))


def bottleneck(config: ModelConfig) -> int:
  """R, the rank of every map that dense connections make from a layer's input."""
  return max(1, config.width // config.dense.gate_reduction)


def make_gates(
    config: ModelConfig, sources: int, width: int, axis: str | None, rngs: nnx.Rngs
) -> nnx.List:
  """One gate for all sources, or one for each, nearest first."""
  count = 1 if config.dense.gate_sharing == "shared" else sources
  return nnx.List([Gate(config, width, axis, rngs) for _ in range(count)])


def of_source(gates: Sequence[Gate], source: int) -> Gate:
  """The gate of a source, where one may stand for all."""
  return gates[source if len(gates) > 1 else 0]


def project_query(query: Array, matrix: Array) -> Array:
  """W^T q: [..., N] with W [N, N], or [..., J, N] with one matrix for each group of heads."""
  rule = "...jn,jnm->...jm" if matrix.ndim == 3 else "...n,nm->...m"
  return jnp.einsum(rule, query, matrix.astype(query.dtype))


def identity_matrices(rngs: nnx.Rngs, count: int, query: tuple[int, ...]) -> nnx.Param:
  """`count` maps over the state axis for queries of that trailing shape, all the identity."""
  return parameter(
      rngs, (count, *query, query[-1]),
      (None, "heads", None, None) if len(query) == 2 else (None, None, None),
      lambda _, shape: jnp.broadcast_to(jnp.eye(shape[-1], dtype=jnp.float32), shape),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Phi:
  """The transition of one source at the tokens at hand, [B, T, ...] or [B, ...].

  Attributes:
    channel_gate: g_E, [..., E]; None is one.
    state_gate: g_N, [..., N]; None is one.
    matrix: the linear projection, [N, N] or [J, N, N]; None is the identity.
    low_rank: V [N, R] and U [R, N] of the projection h + U silu(V h); None without.
    fixed_query: the family's query is no function of the token, [E, N].
  """

  channel_gate: Array | None
  state_gate: Array | None
  matrix: Array | None
  low_rank: tuple[Array, Array] | None
  fixed_query: bool = dataclasses.field(metadata={"static": True})

  @property
  def is_query(self) -> bool:
    """Reading phi(h) is reading h with another query, but for the channel gate."""
    return self.low_rank is None and (self.state_gate is None or not self.fixed_query)

  def query(self, query: Array) -> Array:
    """The query of h that reads phi(h), where there is one."""
    gate = self.state_gate
    if gate is not None:
      query = query * gate.reshape(*gate.shape[:-1], *(1,) * (query.ndim - gate.ndim), -1)
    return query if self.matrix is None else project_query(query, self.matrix)

  def read(self, source: StateSequence, query: Array) -> Array:
    """What the query reads of phi(h) but for the channel gate, float32."""
    if self.is_query:
      return source.read(self.query(query))
    return source.read_mapped(query, self.project, self.state_gate)

  def gated(self, y: Array) -> Array:
    """The channel gate times a read, or (with one axis more) times states; float32."""
    y, gate = y.astype(jnp.float32), self.channel_gate
    if gate is None:
      return y
    shape = y.shape if gate.size == y.size else (*y.shape[:-1], 1)
    return gate.astype(jnp.float32).reshape(shape) * y

  def project(self, h: Array, state_gate: Array | None) -> Array:
    """The projection times g_N, of one token's states [B, ..., N], with g_N [B, N]."""
    if self.matrix is not None and self.matrix.ndim == 3:
      matrix = jnp.repeat(self.matrix, h.shape[1] // self.matrix.shape[0], axis=0)
      h = jnp.einsum("bhpm,hnm->bhpn", h, matrix)
    elif self.matrix is not None:
      h = jnp.einsum("...m,nm->...n", h, self.matrix)
    if self.low_rank is not None:
      down, up = self.low_rank
      h = h + jnp.dot(jax.nn.silu(jnp.dot(h, down)), up)
    if state_gate is not None:
      shape = (state_gate.shape[0], *(1,) * (h.ndim - 2), -1)
      h = h * state_gate.astype(h.dtype).reshape(shape)
    return h


class Transition(nnx.Module):
  """The parameters of phi for all sources of a layer.

  Args:
    config: the model.
    reads: what is read.
  """

  def __init__(self, config: ModelConfig, reads: Reads, rngs: nnx.Rngs) -> None:
    dense, state_size = config.dense, reads.query[-1]
    self.projection, self.fixed_query = dense.transition, reads.fixed_query
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

  def phi(self, x: Array, source: int) -> Phi:
    """phi of a source (0 is the nearest) at the layer's input [..., D]."""
    channel = state = matrix = low_rank = None
    if hasattr(self, "channel_gates"):
      channel = of_source(self.channel_gates, source)(x)
    if hasattr(self, "state_gates"):
      # Around one: were both gates zero at the start, neither would learn.
      state = 1 + of_source(self.state_gates, source)(x)
    if self.projection == "linear":
      matrix = self.linear[...][source]
    elif self.projection == "mlp":
      low_rank = self.down[...][source], self.up[...][source]
    return Phi(channel, state, matrix, low_rank, self.fixed_query)
