"""The parts that the TPU kernels of matrix states share: arguments, and a source's chunk of tokens.

Arguments of type PyTree, Stream or Finish are references to a program's own blocks of the arrays.
References named _BEN are to states of the whole batch: those stay in HBM and are copied when
needed, as buffers for them would fill most of VMEM.

Letters of the kernels alone: X rows of the states in one block, U heads in it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.matrix.log_decay import LogDecay, weight
from dense_jax.types import Array, PyTree

# Rows and columns of a float32 tile.
SUBLANES, LANES = 8, 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """The gate silu(hidden up), as the kernels take it, or references, specs or gradients of it.

  The reference to `up_RE` has the columns of a set of blocks. Its gradient, `[B, R, E]`, is that
  of each row of the batch.
  """

  hidden_BTR: PyTree
  up_RE: PyTree

  def before(self, place: "Place", dtype: jnp.dtype) -> Array:
    """Returns a block's gate before silu, [C, X] in float32."""
    return dot(self.hidden_BTR[...], self.up_RE[:, place.set_rows], (1, 0), dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
  """A source as the kernels take it, or references, block specs or gradients of its arrays.

  K is J * N here. `sum_BHG2C` is the log decay, summed within each chunk: the rows `high` and
  `low` of a `LogDecay`. Its gradient has the row `low` alone. A gate is an array [B, T, E] or a
  `LowRank`. Without a scale, a gate or an initial state, those are None.

  A source that joins is one of several keys and values a token of a recurrence whose state, gate
  and initial state are those of its leader, the last source before it that does not join.
  """

  q_BTK: PyTree
  k_BTK: PyTree
  v_BTE: PyTree
  scale_BHG1C: PyTree
  sum_BHG2C: PyTree
  gate: PyTree
  initial_BEN: PyTree
  joins: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finish:
  """The arrays of an `Epilogue`, or references, block specs or gradients of them.

  `skip_1E` repeats a head's skip for its channels; its gradient, `[B, G, 1, E]`, is that of each
  row and chunk. With a skip, an `x_BTE` of None means the first source's values without scale,
  and the gradient of those is part of the source's.
  """

  skip_1E: PyTree
  x_BTE: PyTree
  z_BTE: PyTree


@dataclasses.dataclass(frozen=True)
class Blocks:
  """A division of the E = H * P rows of a state into blocks, and of those into sets.

  The programs of a set run one after the other on each chunk, and what they share is computed
  once and summed in VMEM.

  Attributes:
    heads: U, the heads in a block.
    width: rows of each of these heads.
    per_head: blocks that one head is cut into; 1 if a block holds whole heads.
    per_group: blocks of a group of heads that share keys.
    per_set: blocks of a set, which divides a group, and a head or is a multiple of heads.
    count: the number of all blocks.
  """

  heads: int
  width: int
  per_head: int
  per_group: int
  per_set: int
  count: int

  @property
  def rows(self) -> int:
    """X, the rows of a block."""
    return self.heads * self.width

  @property
  def key_shares(self) -> int:
    """The sets of a group, each with a share of the gradients of its keys."""
    return self.per_group // self.per_set

  @property
  def head_shares(self) -> int:
    """The sets of a head, each with a share of what is summed over a head's channels."""
    return max(1, self.per_head // self.per_set)

  def of(self, x_CX: PyTree, head: int) -> Array:
    """Returns the lanes of one of the block's heads."""
    return x_CX[:, head * self.width : (head + 1) * self.width]

  def put(self, x_CX: PyTree, x_CP: Array, head: int) -> None:
    """Writes the lanes of one of the block's heads, rounded to the reference's dtype."""
    x_CX[:, head * self.width : (head + 1) * self.width] = x_CP.astype(x_CX.dtype)


@dataclasses.dataclass(frozen=True)
class Place:
  """The place of a program in the grid; made outside branches, where this cannot be asked.

  Attributes:
    row: the row of the batch.
    block: the block in its set.
    is_first_block, is_last_block: whether it is the first or the last of its set.
    begins_head: whether it is the first block of a head in its set.
    is_first_chunk, is_last_chunk: whether the chunk is the first or the last that is visited.
    set_rows: the block's rows in the states of its set.
    all_rows: the block's rows in those of the batch.
  """

  row: Array
  block: Array
  is_first_block: Array
  is_last_block: Array
  begins_head: Array
  is_first_chunk: Array
  is_last_chunk: Array
  set_rows: pl.Slice | slice
  all_rows: pl.Slice | slice

  @classmethod
  def here(cls, blocks: Blocks) -> "Place":
    """Returns the place of the program that runs."""
    block, chunk = pl.program_id(3), pl.program_id(2)
    begin = pl.multiple_of(block * blocks.rows, LANES)
    all_begin = (pl.program_id(1) * blocks.per_set + block) * blocks.rows
    return cls(
        row=pl.program_id(0), block=block,
        is_first_block=block == 0, is_last_block=block == blocks.per_set - 1,
        begins_head=jax.lax.rem(block, min(blocks.per_head, blocks.per_set)) == 0,
        is_first_chunk=chunk == 0, is_last_chunk=chunk == pl.num_programs(2) - 1,
        set_rows=pl.ds(begin, blocks.rows),
        all_rows=pl.ds(pl.multiple_of(all_begin, LANES), blocks.rows),
    )


def dot(left: Array, right: Array, axes: tuple[int, int], dtype: jnp.dtype) -> Array:
  """Contracts an axis of each array, with factors in `dtype` and float32 sums."""
  exact = dtype == jnp.float32
  return jax.lax.dot_general(
      left.astype(dtype), right.astype(dtype), (((axes[0],), (axes[1],)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
      preferred_element_type=jnp.float32,
  )


def joined(heads: Sequence[Array]) -> Array:
  """Returns the lanes of all heads of a block, side by side."""
  return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=1)


def to_columns(rows: Sequence[Array]) -> list[Array]:
  """Turns rows [1, C] into columns [C, 1] by one transposition of whole tiles."""
  empty = -len(rows) % SUBLANES
  padding = [jnp.zeros((empty, rows[0].shape[1]), jnp.float32)] if empty else []
  columns = jnp.concatenate([*rows, *padding], axis=0).T
  return [columns[:, i : i + 1] for i in range(len(rows))]


def write_rows(columns: Sequence[Sequence[Array]], rows_UnC: PyTree, place: Place) -> None:
  """Writes n columns [C, 1] of each head as rows, or adds them to those of a head's first part."""
  flat = [column for head in columns for column in head]
  chunk, each = flat[0].shape[0], len(columns[0])
  empty = -len(flat) % SUBLANES
  padding = [jnp.zeros((chunk, empty), jnp.float32)] if empty else []
  rows = jnp.concatenate([*flat, *padding], axis=1).T

  @pl.when(place.begins_head)
  def _write() -> None:
    for head in range(len(columns)):
      rows_UnC[head] = rows[head * each : (head + 1) * each]

  @pl.when(jnp.logical_not(place.begins_head))
  def _add() -> None:
    for head in range(len(columns)):
      rows_UnC[head] += rows[head * each : (head + 1) * each]


class Tokens:
  """A source's chunk, with its decays: exponents are <= 0, and masked before exp.

  Attributes:
    q_CN, k_CN: queries and keys.
    raw_CX: values without their scale.
    dtype: that of factors of matmuls.
    scores_CC: products of queries (first axis) and keys.
    from_start_C1: for each head, the decay of the carried state up to each token.
    to_end_C1: for each head, the decay from each token to the end of the chunk.
    whole_11: for each head, the decay of the carried state over the whole chunk.
  """

  def __init__(
      self, blocks: Blocks, place: Place, source: Stream, count_1C: PyTree, scores_CC: PyTree
  ) -> None:
    self._blocks = blocks
    self.q_CN, self.k_CN = source.q_BTK[...], source.k_BTK[...]
    self.raw_CX = source.v_BTE[...]
    self.dtype = jnp.result_type(self.q_CN, self.k_CN, self.raw_CX)

    @pl.when(place.is_first_block)
    def _share() -> None:
      scores_CC[...] = dot(self.q_CN, self.k_CN, (1, 1), self.dtype)

    self.scores_CC = scores_CC[...]
    count = None if count_1C is None else count_1C[...]
    self._decays(source.sum_BHG2C, source.scale_BHG1C, count)

  def _decays(self, sum_U2C: PyTree, scale_U1C: PyTree, count_1C: Array | None) -> None:
    heads, _, chunk = sum_U2C.shape
    self._rows = [LogDecay(sum_U2C[head, 0:1], sum_U2C[head, 1:2]) for head in range(heads)]
    carried = None if count_1C is None else count_1C == 0
    kept = None if count_1C is None else count_1C == count_1C[:, chunk - 1 :]
    from_start = [weight(carried, rows.total()) for rows in self._rows]
    to_end = [weight(kept, rows[:, chunk - 1 :].since(rows)) for rows in self._rows]
    self.whole_11 = [weight_1C[:, chunk - 1 :] for weight_1C in from_start]

    scales = [] if scale_U1C is None else [scale_U1C[head] for head in range(heads)]
    counts = [] if count_1C is None else [count_1C]
    high_and_low = [row_1C for rows in self._rows for row_1C in (rows.high, rows.low)]
    columns = to_columns([*high_and_low, *from_start, *to_end, *counts, *scales])
    self._columns = [LogDecay(*columns[i : i + 2]) for i in range(0, 2 * heads, 2)]
    self.from_start_C1 = columns[2 * heads : 3 * heads]
    self.to_end_C1 = columns[3 * heads : 4 * heads]
    self._scale_C1 = columns[4 * heads + len(counts) :]
    self._query = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    self._key = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    self._sees = self._query >= self._key
    if count_1C is not None:
      self._sees &= columns[4 * heads] == count_1C

  def value_CP(self, head: int) -> Array:
    """Returns a head's values with their scale, rounded to the values' dtype."""
    return self.scaled(self._blocks.of(self.raw_CX, head), head).astype(self.raw_CX.dtype)

  def scaled(self, x_CP: Array, head: int) -> Array:
    """Multiplies by the head's scale; unchanged if there is none."""
    return self._scale_C1[head] * x_CP.astype(jnp.float32) if self._scale_C1 else x_CP

  def within_CC(self, head: int) -> Array:
    """Returns the decay from the key's token (second axis) to the query's (first axis)."""
    return weight(self._sees, self._columns[head].since(self._rows[head]))

  def itself_CC(self) -> Array:
    """Returns a bool mask, true where the query's token is the key's."""
    return self._query == self._key

  def decayed(self, h_XN: Array) -> Array:
    """Returns the decay over the chunk times h."""
    width = self._blocks.width
    heads = [
        whole_11 * h_XN[head * width : (head + 1) * width]
        for head, whole_11 in enumerate(self.whole_11)
    ]
    return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=0)


def sigmoid_and_silu(z: Array) -> tuple[Array, Array]:
  """Returns sigmoid(z) and silu(z), float32."""
  z = z.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(z)
  return sigmoid, z * sigmoid


def silu_slope(z: Array) -> Array:
  """Returns the derivative of silu at z, float32."""
  sigmoid, silu = sigmoid_and_silu(z)
  return sigmoid + silu * (1 - sigmoid)
