"""Programs of the GPU kernel of gradients inside chunks: a tile, its chunk and its parts.

A program takes one tile of a row and all heads of a group, part by part: so it sums the gradients
of the keys and queries that they share. It reads the tile as queries, against the tiles before it
in its chunk, and as keys, against those after it. Attributes of type PyTree or Stream are
references to the group's blocks of the arrays, all tokens of the row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.matrix.gpu_tiles import Decays, Plan, Stream, div, rem, scaled
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSums:
  """Sums over one part's channels X, float32, as references or arrays [B, H, A, T].

  A are narrow parts, but for `read`.

  Attributes:
    read: of the gradient of the read times the read, [B, H, A, O, T]: one share for each offset of
      the tile whose values are read, undefined if it is in another chunk, then one for each piece
      of the carried state.
    value: of the scaled value times its gradient.
    scale: of the value times the gradient of the scaled value; None without a scale.
  """

  read: PyTree
  value: PyTree
  scale: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartSums:
  """Sums over one part's channels X and a tile's tokens, float32, as references or arrays.

  A are narrow parts, but for `whole`.

  Attributes:
    last: what the tile's values in the state after the chunk add to the gradient of the summed log
      decay of the chunk's last token, [B, tiles, H, A].
    whole: what the state before the chunk adds there, [B, G, H, A].
    skip: the gradient of `Epilogue.skip`, [B, tiles, H, A]; None without it.
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
  """The program's tile, and what all its parts are computed from.

  Attributes:
    plan: the sizes.
    stream: the source.
    count_T: resets up to each token, inclusive; None means none.
    d_read_TU: the gradient of the read.
    tile: the tile.
  """

  plan: Plan
  stream: Stream
  count_T: PyTree
  d_read_TU: PyTree
  tile: Array

  @property
  def rows(self) -> PyTree:
    """The tile's tokens."""
    return self.plan.rows(self.tile)

  @property
  def chunk(self) -> Array:
    """The tile's chunk."""
    return div(self.tile, self.plan.tiles)

  @property
  def first(self) -> Array:
    """The first token of the chunk."""
    return self.chunk * self.plan.chunk

  @property
  def last(self) -> Array:
    """The last token of the chunk."""
    return self.first + self.plan.chunk - 1

  def at(self, offset: int) -> Array:
    """Returns a tile near the program's, or some tile if there is none."""
    return jnp.clip(self.tile + offset, 0, self.plan.chunks * self.plan.tiles - 1)

  def if_in_chunk(self, offset: int, function: Callable[[PyTree], PyTree], x: PyTree) -> PyTree:
    """Returns function(x) if the tile at an offset is in the program's chunk, else x."""
    if not offset:
      return function(x)
    place = rem(self.tile, self.plan.tiles) + offset
    return jax.lax.cond((place >= 0) & (place < self.plan.tiles), function, lambda x: x, x)

  @property
  def earlier(self) -> range:
    """Offsets of tiles whose keys the program's queries may see."""
    return range(0, -self.plan.tiles, -1)

  @property
  def later(self) -> range:
    """Offsets of tiles whose queries may see the program's keys."""
    return range(self.plan.tiles)

  def d_read(self, part: Part, tile: Array) -> Array:
    """Returns the gradient of the read in a tile, rounded to the dtype of matmuls.

    Every use of it is rounded alike, so that terms of the decays' gradients cancel.
    """
    return self.d_read_TU[self.plan.rows(tile), part.channels].astype(self.plan.dtype)

  def decays(self, part: Part) -> Decays:
    """Returns the decays of the part's head."""
    return Decays(self.plan, self.stream, self.count_T, (part.head,))

  def values(self, part: Part, tile: Array) -> Array:
    """Returns the scaled values of a tile."""
    rows, scale_T = self.plan.rows(tile), None
    if self.stream.scale_BHT is not None:
      scale_T = self.stream.scale_BHT[part.head, rows]
    return scaled(self.plan, self.stream.v_BTE[rows, part.channels], scale_T)

  def scores(self, query: Array, key: Array, *, keys_first: bool = False) -> Array:
    """Returns the products [Q, S] of queries and keys of two tiles, or [S, Q] with keys first."""
    plan, stream = self.plan, self.stream
    q, k = plan.load(stream.q_BTK, plan.rows(query)), plan.load(stream.k_BTK, plan.rows(key))
    return plan.summed_dot(*((k, q) if keys_first else (q, k)), (1, 1))

  def each_part(self, body: Callable[[Part, PyTree], PyTree], carry: PyTree) -> PyTree:
    """Calls body(part, carry) for each part of each head in turn."""
    plan = self.plan
    return jax.lax.fori_loop(
        0, plan.per_group * plan.parts, lambda number, carry: body(Part(plan, number), carry),
        carry,
    )

  def zeros_keys(self) -> Array:
    """Returns zeros of the size of a piece of the tile's keys."""
    return jnp.zeros((self.plan.tile, self.plan.piece), jnp.float32)

  def at_each(
      self, offsets: Iterable[int], function: Callable[[int, Array], Array], dtype: jnp.dtype
  ) -> list[Array]:
    """Returns function(offset, zeros) for each tile of the chunk, and zeros for others."""
    zeros = jnp.zeros((self.plan.tile, self.plan.tile), jnp.float32)
    return [
        self.if_in_chunk(offset, functools.partial(function, offset), zeros).astype(dtype)
        for offset in offsets
    ]

  def products(
      self, sum_TN: Array, offsets: Iterable[int], scores: Sequence[Array], x_TK: PyTree,
      piece: PyTree,
  ) -> Array:
    """Adds the products of gradients of scores and a piece of the keys or queries of tiles."""
    for offset, scores_TT in zip(offsets, scores, strict=True):

      def added(sum_TN: Array, offset: int = offset, scores_TT: Array = scores_TT) -> Array:
        x_TN = x_TK[self.plan.rows(self.at(offset)), piece]
        return sum_TN + self.plan.dot(scores_TT, x_TN, (1, 0))

      sum_TN = self.if_in_chunk(offset, added, sum_TN)
    return sum_TN
