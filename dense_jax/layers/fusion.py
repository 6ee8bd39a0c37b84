"""Hidden fusion: how the sources' reads join a layer's own.

Each fusion leaves the own read as it is where all reads of sources, and its own gates, are
zero. All are functions of reads (and of queries), so none needs a state to be stored.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.linear import Linear, fan_in_uniform
from dense_jax.layers.transition import Gate, Reads, bottleneck, identity_matrices, project_query
from dense_jax.types import Array


class Add(nnx.Module):
  """h' = h + sum_i phi(h_i); the base class of all fusions.

  Args:
    config: the model.
    reads: what is read.

  Attributes:
    is_sum: reads are only added up, after what `query` does.
  """

  is_sum = True

  def __init__(self, config: ModelConfig, reads: Reads, rngs: nnx.Rngs) -> None:
    del config, reads, rngs

  def query(self, query: Array, index: int) -> Array:
    """The query that reads the own states (index 0) or those of source number index - 1."""
    del index
    return query

  def __call__(self, x: Array, own: Array, reads: Sequence[Array]) -> Array:
    """Joins reads, [..., E] or [..., H, P] in float32; x is the layer's input [..., D]."""
    del x
    return sum(reads, start=own)


class Concat(Add):
  """h' = W_0 h + sum_i W_i phi(h_i): one linear map over the concatenated states.

  Each W is N x N (for each group of heads) and starts as the identity. Reading W h is
  reading h with the query W^T C.
  """

  def __init__(self, config: ModelConfig, reads: Reads, rngs: nnx.Rngs) -> None:
    del config
    self.linear = identity_matrices(rngs, 1 + reads.sources, reads.query)

  def query(self, query: Array, index: int) -> Array:
    """See `Add`."""
    return project_query(query, self.linear[...][index])


class Gated(Add):
  """h' = (1 - z) h + z sum_i phi(h_i), with z = tanh(gate(x)) for each channel."""

  is_sum = False

  def __init__(self, config: ModelConfig, reads: Reads, rngs: nnx.Rngs) -> None:
    self.gate = Gate(config, reads.channels, "inner", rngs)

  def __call__(self, x: Array, own: Array, reads: Sequence[Array]) -> Array:
    """See `Add`."""
    z = jnp.tanh(self.gate(x).astype(jnp.float32)).reshape(own.shape)
    return own + z * (sum(reads[1:], start=reads[0]) - own)


class Attention(Add):
  """h' = h + sum_i w_i phi(h_i): a softmax over sources, from what was read of them.

  Low-rank keys are made from the reads and a query from the layer's input. The own read
  takes part, so that a layer may attend to no source; its weight is not used otherwise.
  """

  is_sum = False

  def __init__(self, config: ModelConfig, reads: Reads, rngs: nnx.Rngs) -> None:
    rank = bottleneck(config)
    self.to_query = Linear(
        config.width, rank, axes=("embed", None), init=fan_in_uniform(), rngs=rngs
    )
    self.to_key = Linear(
        reads.channels, rank, axes=("inner", None), init=fan_in_uniform(), rngs=rngs
    )

  def __call__(self, x: Array, own: Array, reads: Sequence[Array]) -> Array:
    """See `Add`."""
    query = self.to_query(x).astype(jnp.float32)
    scores = [
        jnp.sum(query * self.to_key(read.reshape(*x.shape[:-1], -1)), axis=-1)
        for read in (own, *reads)
    ]
    weights = jax.nn.softmax(jnp.stack(scores) * query.shape[-1] ** -0.5, axis=0)
    shape = (*x.shape[:-1], *(1,) * (own.ndim - x.ndim + 1))
    return sum(
        (weight.reshape(shape) * read for weight, read in zip(weights[1:], reads, strict=True)),
        start=own,
    )


FUSIONS: Mapping[str, type[Add]] = {
    "add": Add, "concat": Concat, "gated": Gated, "attention": Attention,
}
