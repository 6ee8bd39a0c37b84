"""Hidden fusion: the functions Fuse of equation (3), which join sources' reads to a layer's own.

Every fusion but `Concat`, which maps the own states too, returns the own read unchanged if the
reads of all sources and the fusion's own gates are zero. All are functions of reads and queries,
so none needs stored states.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.dense.gate import Gate, bottleneck
from dense_jax.layers.dense.transition import ReadShape, identity_matrices, project_query
from dense_jax.layers.linear import Linear, fan_in_uniform
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import Read, Recurrence, gated_reads
from dense_jax.types import Array


class Add(nnx.Module):
  """h' = h + sum_i phi_i(h_i); the base class of all fusions.

  Args:
    config: the model.
    reads: the number and shape of reads.
  """

  def __init__(self, config: ModelConfig, reads: ReadShape, rngs: nnx.Rngs) -> None:
    del config, rngs
    self.sources = reads.sources

  def queries(self, query: Array) -> list[Array]:
    """Returns the queries of the layer's own states and of each source's, nearest first."""
    return [query] * (1 + self.sources)

  def __call__(
      self, x_D: Array, states: Recurrence, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    """Runs the layer's recurrence and joins its read with those of the sources.

    Args:
      x_D: the layer's input, [..., D].
      states: the layer's recurrence.
      query: the query of the layer's own states.
      reads: the gated reads of sources, nearest first.
      epilogue: what follows the fused read.

    Returns:
      The epilogue of the fused read, and the state after the last token.
    """
    del x_D
    return states.finish(query, reads, epilogue)


class Concat(Add):
  """h' = W_0 h + sum_i W_i phi_i(h_i): one linear map over the concatenated states.

  Each W is N x N, one for each group of heads, and starts as the identity. Reading W h with the
  query C is reading h with the query W^T C.
  """

  def __init__(self, config: ModelConfig, reads: ReadShape, rngs: nnx.Rngs) -> None:
    super().__init__(config, reads, rngs)
    self.linear = identity_matrices(rngs, 1 + reads.sources, reads.query)

  def queries(self, query: Array) -> list[Array]:
    """See `Add`."""
    linear = self.linear[...]
    return [project_query(query, linear[index]) for index in range(1 + self.sources)]


class _OfReads(Add):
  """A fusion that needs each read separately."""

  def join(self, x_D: Array, own: Array, reads: Sequence[Array]) -> Array:
    """Joins the own read and the sources', [..., E] or [..., H, P] in float32."""
    raise NotImplementedError

  def __call__(
      self, x_D: Array, states: Recurrence, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    """See `Add`."""
    y, final = states.run(query)
    own, *others = gated_reads(y, reads)
    return epilogue(self.join(x_D, own, others)), final


class Gated(_OfReads):
  """h' = (1 - z) h + z sum_i phi_i(h_i), with z = tanh(gate(x)) for each channel."""

  def __init__(self, config: ModelConfig, reads: ReadShape, rngs: nnx.Rngs) -> None:
    super().__init__(config, reads, rngs)
    self.gate = Gate(config, reads.channels, "inner", rngs)

  def join(self, x_D: Array, own: Array, reads: Sequence[Array]) -> Array:
    """See `_OfReads`."""
    z = jnp.tanh(self.gate(x_D).astype(jnp.float32)).reshape(own.shape)
    return own + z * (sum(reads[1:], start=reads[0]) - own)


class Attention(_OfReads):
  """h' = h + sum_i w_i phi_i(h_i), with softmax weights w over sources, computed from their reads.

  Keys are low-rank maps of the reads, and the query is one of the layer's input. The softmax
  includes the own read, so that a layer may attend to no source; its weight is not used otherwise.
  """

  def __init__(self, config: ModelConfig, reads: ReadShape, rngs: nnx.Rngs) -> None:
    super().__init__(config, reads, rngs)
    rank = bottleneck(config)
    self.to_query = Linear(
        config.width, rank, axes=("embed", None), init=fan_in_uniform(), rngs=rngs
    )
    self.to_key = Linear(
        reads.channels, rank, axes=("inner", None), init=fan_in_uniform(), rngs=rngs
    )

  def join(self, x_D: Array, own: Array, reads: Sequence[Array]) -> Array:
    """See `_OfReads`."""
    query_R = self.to_query(x_D).astype(jnp.float32)
    scores = [
        jnp.sum(query_R * self.to_key(read.reshape(*x_D.shape[:-1], -1)), axis=-1)
        for read in (own, *reads)
    ]
    weights = jax.nn.softmax(jnp.stack(scores) * query_R.shape[-1] ** -0.5, axis=0)
    shape = (*x_D.shape[:-1], *(1,) * (own.ndim - x_D.ndim + 1))
    return sum(
        (weight.reshape(shape) * read for weight, read in zip(weights[1:], reads, strict=True)),
        start=own,
    )


FUSIONS: Mapping[str, type[Add]] = {
    "add": Add, "concat": Concat, "gated": Gated, "attention": Attention,
}
