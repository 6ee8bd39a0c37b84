"""The selective diagonal recurrences of a layer and its sources, read in one TPU kernel.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = sum over sources of g_t (C_t h_t)

States stay in VMEM. Under differentiation, the forward pass writes only the state before each
chunk to HBM, and the backward kernel recomputes the others. The grid visits the chunks of a row
one after the other and, within a chunk, the tiles of E. So B and C are fetched once per chunk,
their gradients (sums over E) are complete at the chunk's end, and the states of all channels
(N x E numbers per source) stay in scratch memory until the next chunk.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dense_jax.ops.chunks import pad_time
from dense_jax.ops.diagonal.tpu_kernels import (
    GROUP,
    Diagonal,
    backward_kernel,
    forward_kernel,
)
from dense_jax.types import Array, PyTree

# The channels of a tile are a multiple of a register's lanes. With N = 16, a state of 256 channels
# takes 4 of the 64 registers, so three sources' states stay in registers across tokens.
LANES = 128
TILE = 256
# Limit of the backward kernel's blocks, out of the 16 MB that the compiler grants by default.
# At N = 16 it allows chunks of 128 tokens for two sources, of 64 for three.
VMEM_BYTES = 8 * 2**20
# Longer chunks would save little memory: at 128 and N = 16 the saved states are 1/8 of dt.
MAX_CHUNK = 128


def selective_reads(
    sources: Sequence[Diagonal],
    resets_BT: Array | None,
    *,
    chunk: int = 0,
    interpret: bool = False,
) -> tuple[Array, Array]:
  """Computes the sum of gated reads of selective recurrences (arXiv 2312.00752, equation 2a).

  Differentiable in every array of every source. Each gradient has its input's dtype, and all
  sums are float32.

  Args:
    sources: the recurrences, at least one, all with the same B, T, E and N.
    resets_BT: bool, true where all states are cleared before the token; None means never.
    chunk: tokens between the states that are kept for the backward pass, rounded up to a
      multiple of 16; 0 means the longest chunk that fits VMEM.
    interpret: true to run the kernels without a TPU, for tests.

  Returns:
    y_BTE, the sum over sources of gate (C h), and final_BNE, the first source's state after
    the last token; both float32.
  """
  batch, time, width = sources[0].x_BTE.shape
  state_size = sources[0].a_NE.shape[0]
  for source in sources:
    gates = [] if source.gate_BTE is None else [source.gate_BTE]
    chex.assert_shape([source.dt_BTE, source.x_BTE, *gates], (batch, time, width))
    chex.assert_shape([source.b_BTN, source.c_BTN], (batch, time, state_size))
    chex.assert_shape(source.a_NE, (state_size, width))
    chex.assert_shape(source.initial_BNE, (batch, state_size, width))
    chex.assert_type([source.a_NE, source.initial_BNE], jnp.float32)

  chunk = min(chunk or _default_chunk(sources), time)
  chunk += -chunk % GROUP
  keep_BTE = None
  if resets_BT is not None:
    chex.assert_shape(resets_BT, (batch, time))
    keep_BTE = jnp.where(pad_time(resets_BT, chunk), 0.0, 1.0)[..., None]
  padded = tuple(_pad(source, chunk) for source in sources)
  y_BTE, final_BNE = _reads(padded, keep_BTE, chunk, interpret)
  return y_BTE[:, :time, :width], final_BNE[..., :width]


def _pad(source: Diagonal, chunk: int) -> Diagonal:
  """Pads the last chunk with tokens of dt = 0, and the last tile with channels of zeros."""
  extra = -source.a_NE.shape[1] % LANES

  def lanes(x: Array) -> Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, extra),)) if extra else x

  return Diagonal(
      dt_BTE=pad_time(lanes(source.dt_BTE), chunk),
      a_NE=lanes(source.a_NE),
      x_BTE=pad_time(lanes(source.x_BTE), chunk),
      b_BTN=pad_time(source.b_BTN, chunk),
      c_BTN=pad_time(source.c_BTN, chunk),
      gate_BTE=None if source.gate_BTE is None else pad_time(lanes(source.gate_BTE), chunk),
      initial_BNE=lanes(source.initial_BNE),
  )


def _default_chunk(sources: Sequence[Diagonal]) -> int:
  """Returns the longest chunk, in tokens, with which the backward kernel fits VMEM_BYTES."""
  state_size, width = sources[0].a_NE.shape
  state_rows = state_size + -state_size % 8
  state_lanes = state_size + -state_size % LANES
  # float32 numbers per token: each source's dt, x, gate, B, C and their gradients; dy, resets.
  moving = len(sources) * (6 * TILE + 4 * state_lanes) + TILE + LANES
  # Streamed blocks are double-buffered.
  token = 4 * (2 * moving + state_rows * TILE)
  waiting = 4 * len(sources) * 2 * state_rows * width
  chunk = MAX_CHUNK
  while chunk > GROUP and waiting + chunk * token > VMEM_BYTES:
    chunk //= 2  # Most lengths are multiples of a power of two and then need no padding.
  return chunk


@dataclasses.dataclass(frozen=True)
class _Grid:
  """The grid of a kernel (rows, chunks, tiles), and the blocks of arrays at each point."""

  batch: int
  chunks: int
  chunk: int
  state_size: int
  tiles: int
  tile: int
  reverse: bool
  """True if the last chunk is visited first."""

  @classmethod
  def of(cls, source: Diagonal, chunk: int, *, reverse: bool = False) -> Self:
    """Returns the grid for padded arrays."""
    batch, time, width = source.x_BTE.shape
    tile = TILE if width % TILE == 0 else LANES
    return cls(batch, time // chunk, chunk, source.a_NE.shape[0], width // tile, tile, reverse)

  def _block(self, shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> Any:
    """Makes a block spec; `index(b, g, e)` is the block's index for a row, a chunk and a tile."""

    def of_point(b: Array, g: Array, e: Array) -> tuple[Any, ...]:
      return index(b, self.chunks - 1 - g if self.reverse else g, e)

    return pl.BlockSpec(shape, of_point)

  def channels(self) -> Any:
    """Returns the block spec of an array [B, T, E]."""
    return self._block((None, self.chunk, self.tile), lambda b, g, e: (b, g, e))

  def tokens(self, size: int) -> Any:
    """Returns the block spec of an array [B, T, size], the same at all tiles."""
    return self._block((None, self.chunk, size), lambda b, g, e: (b, g, 0))

  def states(self) -> Any:
    """Returns the block spec of an array [B, G, N, E]."""
    shape = (None, None, self.state_size, self.tile)
    return self._block(shape, lambda b, g, e: (b, g, 0, e))

  def row_states(self, *, before: bool) -> Any:
    """Returns the block spec of an array [B, N, E] of states before a row, or after it.

    The index changes only at the row's first chunk (or last, if not `before`), so that no block
    is moved elsewhere.
    """
    border = 0 if before else self.chunks - 1
    first = border == (self.chunks - 1 if self.reverse else 0)
    elsewhere = self.tiles - 1 if first else 0
    shape = (None, self.state_size, self.tile)
    return self._block(shape, lambda b, g, e: (b, 0, jnp.where(g == border, e, elsewhere)))

  def rates(self) -> Any:
    """Returns the block spec of an array [N, E]."""
    return self._block((self.state_size, self.tile), lambda b, g, e: (0, e))

  def recurrence(self, source: Diagonal) -> Any:
    """Returns the block specs of a recurrence's inputs."""
    blocks: Any = Diagonal
    return blocks(
        dt_BTE=self.channels(),
        a_NE=self.rates(),
        x_BTE=self.channels(),
        b_BTN=self.tokens(self.state_size),
        c_BTN=self.tokens(self.state_size),
        gate_BTE=None if source.gate_BTE is None else self.channels(),
        initial_BNE=self.row_states(before=True),
    )

  def waiting(self, sources: int) -> Any:
    """Returns scratch memory for the state of each source and tile."""
    return pltpu.VMEM((sources, self.tiles, self.state_size, self.tile), jnp.float32)

  def call(
      self,
      kernel: Callable[..., None],
      inputs: Sequence[tuple[PyTree, PyTree]],
      outputs: Sequence[tuple[PyTree, PyTree]],
      scratch: Sequence[Any],
      cost: tuple[int, int],
      interpret: bool,
  ) -> PyTree:
    """Runs a kernel at each point of the grid.

    Args:
      kernel: takes references to the inputs, the outputs and the scratch memory.
      inputs: pairs of arrays and their block specs.
      outputs: pairs of shapes and their block specs.
      scratch: the kernel's scratch memory.
      cost: total floating-point operations and exponentials.
      interpret: true to run without a TPU.

    Returns:
      The outputs.
    """
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    moved = jax.tree.leaves((arrays, shapes))
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(self.batch, self.chunks, self.tiles),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=cost[0],
            transcendentals=cost[1],
            bytes_accessed=sum(leaf.size * leaf.dtype.itemsize for leaf in moved),
        ),
        interpret=interpret,
    )(*arrays)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _numbers(sources: tuple[Diagonal, ...]) -> int:
  """Returns the size of the states of all tokens and sources, S B T N E, for cost estimates."""
  return len(sources) * sources[0].x_BTE.size * sources[0].a_NE.shape[0]


def _inputs(
    grid: _Grid, sources: tuple[Diagonal, ...], keep_BTE: Array | None
) -> list[tuple[PyTree, PyTree]]:
  return [
      (sources, tuple(grid.recurrence(source) for source in sources)),
      (keep_BTE, None if keep_BTE is None else grid.tokens(1)),
  ]


def _forward(
    sources: tuple[Diagonal, ...],
    keep_BTE: Array | None,
    chunk: int,
    interpret: bool,
    *,
    save: bool,
) -> tuple[Array, Array, tuple[Array, ...]]:
  """Computes y_BTE, final_BNE and, if `save`, each source's states before chunks [B, G, N, E]."""
  grid = _Grid.of(sources[0], chunk)
  batch, time, width = sources[0].x_BTE.shape
  size, saved = grid.state_size, len(sources) if save else 0
  # For each number of the state, a step takes four operations and a read two.
  numbers = _numbers(sources)
  return grid.call(
      forward_kernel,
      _inputs(grid, sources, keep_BTE),
      [
          (_float32(batch, time, width), grid.channels()),
          (_float32(batch, size, width), grid.row_states(before=False)),
          ((_float32(batch, grid.chunks, size, width),) * saved, (grid.states(),) * saved),
      ],
      [grid.waiting(len(sources))],
      (6 * numbers, numbers),
      interpret,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _reads(
    sources: tuple[Diagonal, ...], keep_BTE: Array | None, chunk: int, interpret: bool
) -> tuple[Array, Array]:
  y_BTE, final_BNE, _ = _forward(sources, keep_BTE, chunk, interpret, save=False)
  return y_BTE, final_BNE


def _reads_forward(
    sources: tuple[Diagonal, ...], keep_BTE: Array | None, chunk: int, interpret: bool
) -> tuple[tuple[Array, Array], PyTree]:
  y_BTE, final_BNE, before = _forward(sources, keep_BTE, chunk, interpret, save=True)
  return (y_BTE, final_BNE), (sources, keep_BTE, before)


def _reads_backward(
    chunk: int, interpret: bool, saved: PyTree, cotangents: tuple[Array, Array]
) -> tuple[tuple[Diagonal, ...], None]:
  sources, keep_BTE, before = saved
  dy_BTE, dfinal_BNE = cotangents
  grid = _Grid.of(sources[0], chunk, reverse=True)
  size = grid.state_size

  def shapes(source: Diagonal) -> Any:
    # Sums over tokens or channels are float32 until complete.
    shape: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), source)
    return dataclasses.replace(
        shape,
        a_NE=_float32(grid.batch, *source.a_NE.shape),
        b_BTN=_float32(*source.b_BTN.shape),
        c_BTN=_float32(*source.c_BTN.shape),
    )

  def blocks(source: Diagonal) -> Any:
    return dataclasses.replace(grid.recurrence(source), a_NE=grid.row_states(before=True))

  numbers = _numbers(sources)
  (gradients,) = grid.call(
      backward_kernel,
      [
          *_inputs(grid, sources, keep_BTE),
          (before, (grid.states(),) * len(sources)),
          (dy_BTE, grid.channels()),
          (dfinal_BNE, grid.row_states(before=False)),
      ],
      [(tuple(map(shapes, sources)), tuple(map(blocks, sources)))],
      [
          pltpu.VMEM((chunk + 1, size, grid.tile), jnp.float32),
          grid.waiting(len(sources)),
          grid.waiting(len(sources)),
      ],
      # The steps and their decays are recomputed; the adjoint takes 16 operations.
      (21 * numbers, 2 * numbers),
      interpret,
  )
  return tuple(
      dataclasses.replace(
          gradient,
          a_NE=jnp.sum(gradient.a_NE, axis=0),
          b_BTN=gradient.b_BTN.astype(source.b_BTN.dtype),
          c_BTN=gradient.c_BTN.astype(source.c_BTN.dtype),
      )
      for source, gradient in zip(sources, gradients, strict=True)
  ), None


_reads.defvjp(_reads_forward, _reads_backward)
