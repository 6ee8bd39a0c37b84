"""The parts that GPU kernels of matrix states share: sizes, arrays, loads, decays of a chunk.

A kernel sees a row's time axis as chunks of tokens, on which its matmuls work, and between which
states are kept in memory. States are stored and computed as [N, P] here, so that the matmul that
updates them has N rows.

Triton needs sizes that are powers of two, so N is cut into pieces of `piece` numbers and P into
parts of `width` channels. A program's lists of [piece, width] arrays hold one state.

Letters of these files alone: X a part of one head's channels, U all channels of a group; in arrays
of a chunk, Q queries and S keys; [H, A] the heads and their parts; O what a read is the sum of: the
chunk's own tokens, and each piece of the carried state.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.matrix.log_decay import LogDecay, weight
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.ops.triton_functions import silu, silu_slope
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
  """A source as the kernels take it, or references, block specs or gradients of its arrays.

  Attributes:
    q_BTK: queries of all groups; K is J * N here.
    k_BTK: keys.
    v_BTE: values.
    scale_BHT: float32 factor of the values; None means 1.
    high_BHT: the log decay, summed within each chunk: `high` of a `LogDecay`; its B may be 1.
    low_BHT: `low` of it.
    initial_BHPN: float32 state before the first token; None means zero.
    joins: true if it is one of several keys and values a token of a recurrence whose state is that
      of its leader, the last source before it that does not join.
  """

  q_BTK: PyTree
  k_BTK: PyTree
  v_BTE: PyTree
  scale_BHT: PyTree
  high_BHT: PyTree
  low_BHT: PyTree
  initial_BHPN: PyTree
  joins: bool = dataclasses.field(metadata={"static": True})

  def values_alone(self) -> "Stream":
    """Returns what a pass over the leader's states takes of a source that joins."""
    none: Any = {name: None for name in ("q_BTK", "high_BHT", "low_BHT", "initial_BHPN")}
    return dataclasses.replace(self, **none)


def recurrence(streams: Sequence[Stream], leader: int) -> tuple[Stream, ...]:
  """Returns a leader, and what joins it."""
  members = itertools.takewhile(lambda stream: stream.joins, streams[leader + 1 :])
  return streams[leader], *(stream.values_alone() for stream in members)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes that the kernels are compiled for; T, P and N are padded.

  Attributes:
    batch: B.
    tokens: T before it was padded.
    chunks: G.
    chunk: C, tokens of a matmul and between stored states.
    heads: H.
    groups: J.
    channels: P.
    state_size: N.
    width: channels of a part of a head; divides P.
    piece: numbers of a piece of N; divides it.
    gates: for each source, the index of its gate among the gates; None means 1.
    dtype: that of matmuls' operands and of states between chunks.
    out: the dtype of the result.
    moments: whether moments are computed.
    shared_decay: whether all rows share the decays.
    interpret: true to run the kernels as ordinary JAX.
  """

  batch: int
  tokens: int
  chunks: int
  chunk: int
  heads: int
  groups: int
  channels: int
  state_size: int
  width: int
  piece: int
  gates: tuple[int | None, ...]
  dtype: jnp.dtype
  out: jnp.dtype
  moments: bool
  shared_decay: bool
  interpret: bool

  @property
  def time(self) -> int:
    """T, padded."""
    return self.chunks * self.chunk

  @property
  def parts(self) -> int:
    """Parts of a head."""
    return self.channels // self.width

  @property
  def per_group(self) -> int:
    """Heads of a group."""
    return self.heads // self.groups

  @property
  def pieces(self) -> range:
    """The first index of each piece of N."""
    return range(0, self.state_size, self.piece)

  def stages(self, sources: int = 1) -> int:
    """Returns the turns of a kernel's loop whose loads are in shared memory at a time.

    Two turns of two sources of N 256 would need 290 KB of the 227 that an H100 has.
    """
    return 2 if sources * self.state_size <= 256 else 1

  def dot(self, left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Contracts an axis of each array, with operands in `dtype` and float32 sums."""
    exact = self.dtype == jnp.float32
    return jax.lax.dot_general(
        left.astype(self.dtype), right.astype(self.dtype), (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )

  def summed_dot(
      self, left: Sequence[Array], right: Sequence[Array], axes: tuple[int, int]
  ) -> Array:
    """Sums the products of two lists of arrays, as of the pieces of N."""
    products = (self.dot(one, other, axes) for one, other in zip(left, right, strict=True))
    return functools.reduce(jnp.add, products)

  def load(self, x_TN: PyTree, rows: PyTree) -> list[Array]:
    """Loads all pieces of keys or queries."""
    return [x_TN[rows, pl.ds(first, self.piece)] for first in self.pieces]

  def rows(self, chunk: Array) -> PyTree:
    """Returns the tokens of a chunk as an index."""
    return pl.ds(chunk * self.chunk, self.chunk)

  def last(self, chunk: Array) -> Array:
    """Returns the last token of a chunk."""
    return chunk * self.chunk + self.chunk - 1

  def end(self, chunk: Array) -> Array:
    """Returns the place in a chunk of its last token that is not padding."""
    return jnp.minimum(self.chunk - 1, self.tokens - 1 - chunk * self.chunk)


def power_of_two(size: int, limit: int) -> int:
  """Returns the largest power of two that divides `size` and is at most `limit`, another one."""
  return min(size & -size, limit)


def div(left: Array, right: int) -> Array:
  """Divides integers >= 0, without the cases that `//` has for negative ones."""
  return jax.lax.div(left, right)


def rem(left: Array, right: int) -> Array:
  """Returns the remainder of integers >= 0."""
  return jax.lax.rem(left, right)


def scaled(v_TX: Array, scale_T: Array | None) -> Array:
  """Returns scale * v, rounded as `MatrixSequence.scaled_BTHP` rounds it."""
  if scale_T is None:
    return v_TX
  return (scale_T[:, None] * v_TX.astype(jnp.float32)).astype(v_TX.dtype)


def open_gate(plan: Plan, gate: PyTree, rows: PyTree) -> tuple[Array, Array | None]:
  """Returns a gate of reads, [C, X] in float32, and its slope.

  Args:
    plan: the sizes.
    gate: a reference to the gate, [T, X], or a low-rank gate of references, [T, R] and [R, X].
    rows: the chunk's tokens.

  Returns:
    The gate, and its derivative by what its activation is applied to; None if there is none.
  """
  if not isinstance(gate, LowRankGate):
    return gate[rows, :].astype(jnp.float32), None
  before_TX = plan.dot(gate.hidden_R[rows, :], gate.up_RE[...], (1, 0))
  return silu(before_TX), silu_slope(before_TX)


@dataclasses.dataclass(frozen=True)
class Decays:
  """The decays of one head; exponents are <= 0, and masked before exp.

  Attributes:
    plan: the sizes.
    stream: references to `high` and `low` of the summed log decay, [T] or [H, T].
    count_T: a reference to the number of resets up to each token; None means none.
    head: the head's index in the references, or nothing if they have no axis of heads.
  """

  plan: Plan
  stream: Stream
  count_T: PyTree
  head: tuple[Array, ...] = ()

  def _at(self, index: PyTree) -> LogDecay:
    return LogDecay(
        self.stream.high_BHT[(*self.head, index)], self.stream.low_BHT[(*self.head, index)]
    )

  def _from_start(self, chunk: Array, index: PyTree) -> Array:
    """Returns the decay of the state before a chunk up to one or more of its tokens."""
    kept = None
    if self.count_T is not None:
      first = chunk * self.plan.chunk
      before = jnp.where(first == 0, 0, self.count_T[jnp.maximum(first - 1, 0)])
      kept = self.count_T[index] == before
    return weight(kept, self._at(index).total())

  def from_start(self, chunk: Array) -> Array:
    """Returns the decay of the state before a chunk up to each of its tokens, [C]."""
    return self._from_start(chunk, self.plan.rows(chunk))

  def whole(self, chunk: Array) -> Array:
    """Returns the decay of the state before a chunk up to its last token, a scalar."""
    return self._from_start(chunk, self.plan.last(chunk))

  def to_end(self, chunk: Array) -> Array:
    """Returns the decay from each token of a chunk to its last one, [C]."""
    rows, last = self.plan.rows(chunk), self.plan.last(chunk)
    kept = None if self.count_T is None else self.count_T[rows] == self.count_T[last]
    return weight(kept, self._at(last).since(self._at(rows)))

  def within(self, chunk: Array) -> Array:
    """Returns the decay [Q, S] from each token of a chunk to each.

    It is 0 where a query's token is earlier than the key's, or in another document.
    """
    rows = self.plan.rows(chunk)
    place = jnp.arange(self.plan.chunk, dtype=jnp.int32)
    sees = place[:, None] >= place[None, :]
    if self.count_T is not None:
      count = self.count_T[rows]
      sees &= count[:, None] == count[None, :]
    sums = self._at(rows)
    queries, keys = (
        LogDecay(sums.high[at], sums.low[at]) for at in ((slice(None), None), (None, slice(None)))
    )
    return weight(sees, queries.since(keys))
