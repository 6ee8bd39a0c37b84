"""Programs of the GPU kernel of gradients inside chunks: a chunk and its parts.

A program takes one chunk of a row and all heads of a group, part by part: so it sums the gradients
of the keys and queries that they share. Attributes of type PyTree or Stream are references to the
group's blocks of the arrays, all tokens of the row.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.experimental import pallas as pl

from dense_jax.ops.matrix.gpu_plan import Decays, Plan, Stream, div, rem, scaled
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSums:
  """Sums over one part's channels X, float32, as references or arrays [B, H, A, T].

  Attributes:
    read: of the gradient of the read times the read, [B, H, A, O, T]: the share of what is read
      inside the chunk, then one for each piece of the carried state, if the source reads it.
    value: of the scaled value times its gradient.
    scale: of the value times the gradient of the scaled value; None without a scale.
  """

  read: PyTree
  value: PyTree
  scale: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartSums:
  """Sums over one part's channels X and a chunk's tokens, float32, as references or arrays.

  Attributes:
    last: what the chunk's values in the state after it add to the gradient of the summed log decay
      of the chunk's last token, [B, G, H, A].
    whole: what each piece of the state before the chunk adds there, [B, G, H, A, pieces]; None for
      a source that joins.
    skip: the gradient of `Epilogue.skip`, [B, G, H, A]; None without it.
  """

  last: PyTree
  whole: PyTree
  skip: PyTree


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of one head of the program's group."""

  plan: Plan
  number: Array

  @property
  def head(self) -> Array:
    """The head among those of the group."""
    return div(self.number, self.plan.parts)

  @property
  def index(self) -> tuple[Array, Array]:
    """The head and its part."""
    return self.head, rem(self.number, self.plan.parts)

  @property
  def channels(self) -> PyTree:
    """The part's channels among those of the group."""
    return pl.ds(self.number * self.plan.width, self.plan.width)

  def state(self, h_GHNP: PyTree, chunk: Array, piece: PyTree) -> Array:
    """Loads a piece [piece, X] of a state."""
    plan = self.plan
    channels = pl.ds(rem(self.number, plan.parts) * plan.width, plan.width)
    return h_GHNP[chunk, self.head, piece, channels]

  def states(self, h_GHNP: PyTree, chunk: Array) -> list[Array]:
    """Loads all pieces of a state."""
    plan = self.plan
    return [self.state(h_GHNP, chunk, pl.ds(start, plan.piece)) for start in plan.pieces]


@dataclasses.dataclass(frozen=True)
class Program:
  """The program's chunk, and what all its parts are computed from.

  Attributes:
    plan: the sizes.
    stream: the source.
    count_T: resets up to each token, inclusive; None means none.
    d_read_TU: the gradient of the read.
    chunk: the chunk.
  """

  plan: Plan
  stream: Stream
  count_T: PyTree
  d_read_TU: PyTree
  chunk: Array

  @property
  def rows(self) -> PyTree:
    """The chunk's tokens."""
    return self.plan.rows(self.chunk)

  def d_read(self, part: Part) -> Array:
    """Returns the gradient of the read, rounded to the dtype of matmuls.

    Every use of it in this kernel is rounded alike, so that terms of the decays' gradients cancel.
    """
    return self.d_read_TU[self.rows, part.channels].astype(self.plan.dtype)

  def decays(self, part: Part) -> Decays:
    """Returns the decays of the part's head."""
    return Decays(self.plan, self.stream, self.count_T, (part.head,))

  def values(self, part: Part) -> Array:
    """Returns the scaled values."""
    scale_T = None
    if self.stream.scale_BHT is not None:
      scale_T = self.stream.scale_BHT[part.head, self.rows]
    return scaled(self.stream.v_BTE[self.rows, part.channels], scale_T)

  def scores(self) -> Array:
    """Returns the products [Q, S] of the chunk's queries and keys."""
    plan, stream = self.plan, self.stream
    q, k = plan.load(stream.q_BTK, self.rows), plan.load(stream.k_BTK, self.rows)
    return plan.summed_dot(q, k, (1, 1))

  def each_part(self, body: Callable[[Part, PyTree], PyTree], carry: PyTree) -> PyTree:
    """Calls body(part, carry) for each part of each head in turn."""
    plan = self.plan
    return jax.lax.fori_loop(
        0, plan.per_group * plan.parts, lambda number, carry: body(Part(plan, number), carry),
        carry,
    )
