"""The sizes that the TPU kernels of matrix states are compiled for, and what fits VMEM."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.chunks import round_up
from dense_jax.ops.matrix.tpu_chunk import LANES, SUBLANES, Blocks, Finish, LowRank, Stream
from dense_jax.types import Array, PyTree

# Tokens per chunk: the side of the matrix unit.
DEFAULT_CHUNK = 128
# Limit of a program's VMEM by the estimate of `choose_blocks`. It leaves a part of the 16 MiB that
# compilers grant by default to what the compiler spills.
VMEM_BYTES = 12 * 2**20
CHUNK_MULTIPLE = 16  # Sublanes of a bfloat16 tile.


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes that the kernels are compiled for; P, N and T are padded.

  Attributes:
    batch, chunks, chunk, heads, groups, channels, state_size: B, G, C, H, J, P and N.
    tokens: T before it was padded.
    dtype: that of the result.
    moments: whether the result's moments are wanted.
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
  dtype: jnp.dtype
  moments: bool
  interpret: bool

  @property
  def rows(self) -> int:
    """E, the rows of a state."""
    return self.heads * self.channels


def compute_dtype(stream: Stream) -> jnp.dtype:
  """Returns the dtype of factors of matmuls, and of states that are kept for the backward pass."""
  return jnp.result_type(stream.q_BTK, stream.k_BTK, stream.v_BTE)


def states(streams: Sequence[Stream]) -> int:
  """Returns the number of states: sources that join have that of another one."""
  return sum(not stream.joins for stream in streams)


def choose_blocks(
    plan: Plan, streams: tuple[Stream, ...], finish: Finish, *, save: bool, backward: bool
) -> Blocks:
  """Chooses the largest sets, and in those the largest blocks, that fit VMEM.

  Args:
    plan: the sizes.
    streams: the sources.
    finish: the epilogue's arrays.
    save: whether the forward kernel saves states.
    backward: true for the backward kernel.
  """
  dtype = compute_dtype(streams[0])
  # Matmuls of float32 split each operand into three of bfloat16.
  spilled = 3 if dtype == jnp.float32 else 1
  sources, chunk, lanes = len(streams), plan.chunk, round_up(plan.state_size, LANES)
  score_bytes = 4 * chunk * round_up(chunk, LANES)
  low_rank = [s.gate for s in streams if isinstance(s.gate, LowRank)]
  arrays = [s.v_BTE for s in streams]
  arrays += [s.gate for s in streams if s.gate is not None and not isinstance(s.gate, LowRank)]
  arrays += [x for x in (finish.x_BTE, finish.z_BTE) if x is not None]
  token_bytes = sum(x.dtype.itemsize for x in arrays) * (2 if backward else 1) + plan.dtype.itemsize
  keys = (4 if backward else 2) * sources * chunk * lanes * dtype.itemsize
  # Blocks are double-buffered. Of a source in the backward pass, two products of states and its
  # reads exist together; the other intermediate values exist for one source at a time.
  fixed = 2 * keys + score_bytes * (sources + 5)
  if backward:
    fixed += sources * (2 * 4 * chunk * lanes + score_bytes) + 2 * 4 * chunk * lanes
    token_bytes += dtype.itemsize * (2 * sources + len(low_rank)) // 2  # Not double-buffered.
  kept = 2 * sources + 2 * len(low_rank) if backward else 1
  # Matrices of gates with their gradients, and their hidden values.
  gate_rows = sum(len(gate.up_RE) for gate in low_rank) * (2 * dtype.itemsize + 4 * backward)
  fixed += len(low_rank) * chunk * LANES * (2 * dtype.itemsize * (1 + backward) + 4 * backward)

  def needed(rows: int, set_rows: int) -> int:
    kept_bytes = (4 * states(streams) * lanes + gate_rows) * set_rows
    if backward or save:
      kept_bytes += 2 * dtype.itemsize * states(streams) * rows * lanes
    values = 2 * token_bytes * chunk * rows + 4 * chunk * rows * (kept + 5 * spilled)
    # Each head's rows of numbers, such as summed log decays, fill a tile.
    heads = max(1, rows // channels) * 2 * 4 * SUBLANES * LANES * (4 if backward else 2) * sources
    return fixed + kept_bytes + values + heads + 2 * spilled * 4 * rows * lanes

  group, channels = plan.heads // plan.groups * plan.channels, plan.channels

  def divides(rows: int, whole: int) -> bool:
    aligned = rows % channels == 0 or channels % rows == 0
    return whole % rows == 0 and rows % LANES == 0 and aligned

  choices = [
      (set_rows, rows)
      for set_rows in range(group, 0, -SUBLANES) if divides(set_rows, group)
      for rows in range(set_rows, 0, -SUBLANES) if divides(rows, set_rows)
  ]
  set_rows, rows = next(
      (choice for choice in choices if needed(choice[1], choice[0]) <= VMEM_BYTES), choices[-1]
  )
  width = min(rows, channels)
  return Blocks(
      heads=rows // width, width=width, per_head=channels // width, per_group=group // rows,
      per_set=set_rows // rows, count=plan.groups * group // rows,
  )


class Specs:
  """Block specs of a program's arrays at row b of the batch, set s, chunk g, and block i of it."""

  def __init__(self, plan: Plan, blocks: Blocks, *, reverse: bool) -> None:
    chunk, size = plan.chunk, plan.state_size
    # Unlike // and %, these compile for TPUs without knowing the sign of the operands.
    div, rem = jax.lax.div, jax.lax.rem

    def at(g: int) -> int:
      return plan.chunks - 1 - g if reverse else g

    def block(s: int, i: int) -> int:
      return s * blocks.per_set + i

    def heads(rows: int, batch: int) -> pl.BlockSpec:
      return pl.BlockSpec(
          (None, blocks.heads, None, rows, chunk),
          lambda b, s, g, i: (
              b if batch > 1 else 0, div(block(s, i), blocks.per_head), at(g), 0, 0
          ),
      )

    def head_shares(rows: int) -> pl.BlockSpec:
      return pl.BlockSpec(
          (None, None, blocks.heads, None, rows, chunk),
          lambda b, s, g, i: (
              rem(s, blocks.head_shares), b, div(block(s, i), blocks.per_head), at(g), 0, 0
          ),
      )

    self._heads, self.head_shares = heads, head_shares
    self._keys = pl.BlockSpec(
        (None, chunk, size), lambda b, s, g, i: (b, at(g), div(s, blocks.key_shares))
    )
    self.values = pl.BlockSpec(
        (None, chunk, blocks.rows), lambda b, s, g, i: (b, at(g), block(s, i))
    )
    self.between = pl.BlockSpec(
        (None, None, blocks.rows, size), lambda b, s, g, i: (b, at(g), block(s, i), 0)
    )
    self.count = pl.BlockSpec((None, None, 1, chunk), lambda b, s, g, i: (b, at(g), 0, 0))
    self._channels = pl.BlockSpec((1, blocks.rows), lambda b, s, g, i: (0, block(s, i)))
    self.d_channels = pl.BlockSpec(
        (None, None, 1, blocks.rows), lambda b, s, g, i: (b, at(g), 0, block(s, i))
    )
    set_rows = blocks.per_set * blocks.rows
    self._up = lambda rank: pl.BlockSpec((rank, set_rows), lambda b, s, g, i: (0, s))
    self._hidden = lambda rank: pl.BlockSpec((None, chunk, rank), lambda b, s, g, i: (b, at(g), 0))
    self._d_hidden = lambda rank: pl.BlockSpec(
        (None, None, chunk, rank), lambda b, s, g, i: (s, b, at(g), 0)
    )
    self.whole = pl.BlockSpec(memory_space=pl.ANY)
    # Gradients to which several sets contribute have a leading axis of shares.
    self.d_keys = pl.BlockSpec(
        (None, None, chunk, size),
        lambda b, s, g, i: (rem(s, blocks.key_shares), b, at(g), div(s, blocks.key_shares)),
    )

  def heads(self, x_BHGnC: Array) -> pl.BlockSpec:
    """Returns the spec of an array with rows of tokens for each head; its B may be 1."""
    return self._heads(x_BHGnC.shape[3], x_BHGnC.shape[0])

  def stream(self, stream: Stream) -> Stream:
    """Returns the specs of a source."""
    return Stream(
        q_BTK=self._keys, k_BTK=self._keys, v_BTE=self.values,
        scale_BHG1C=_unless_none(stream.scale_BHG1C, self.heads),
        sum_BHG2C=self.heads(stream.sum_BHG2C),
        gate=_unless_none(stream.gate, self._gate),
        initial_BEN=_unless_none(stream.initial_BEN, lambda _: self.whole), joins=stream.joins,
    )

  def _gate(self, gate: PyTree) -> PyTree:
    if not isinstance(gate, LowRank):
      return self.values
    rank = len(gate.up_RE)
    return LowRank(self._hidden(rank), self._up(rank))

  def d_gate(self, gate: PyTree) -> PyTree:
    """Returns the specs of the gradient of a gate, or None."""
    if not isinstance(gate, LowRank):
      return _unless_none(gate, self._gate)
    return LowRank(self._d_hidden(len(gate.up_RE)), self.whole)

  def finish(self, finish: Finish) -> Finish:
    """Returns the specs of an epilogue's arrays."""
    return Finish(
        skip_1E=_unless_none(finish.skip_1E, lambda _: self._channels),
        x_BTE=_unless_none(finish.x_BTE, lambda _: self.values),
        z_BTE=_unless_none(finish.z_BTE, lambda _: self.values),
    )


def _unless_none(x: PyTree, make: Any) -> PyTree:
  return None if x is None else make(x)
