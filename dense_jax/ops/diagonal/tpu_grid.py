"""The grid of selective kernels for TPUs, and the blocks of arrays at each of its points."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dense_jax.ops.diagonal.kernel_inputs import LowRank, Source, Wide
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.types import Array, PyTree

# The channels of a tile are a multiple of a register's lanes. With N = 16, a state of 256 channels
# takes 4 of the 64 registers, so three sources' states stay in registers across tokens.
LANES = 128
TILE = 256


def float32(*shape: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of a float32 array."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


@dataclasses.dataclass(frozen=True)
class Grid:
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
  def of(cls, source: Source, chunk: int, *, reverse: bool = False) -> Self:
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

  def row_states(self, *, before: bool, rows: int = 0) -> Any:
    """Returns the block spec of an array [B, N, E] of states before a row, or after it.

    With `rows`, that many take the place of N.

    The index changes only at the row's first chunk (or last, if not `before`), so that no block
    is moved elsewhere.
    """
    border = 0 if before else self.chunks - 1
    first = border == (self.chunks - 1 if self.reverse else 0)
    elsewhere = self.tiles - 1 if first else 0
    shape = (None, rows or self.state_size, self.tile)
    return self._block(shape, lambda b, g, e: (b, 0, jnp.where(g == border, e, elsewhere)))

  def rates(self) -> Any:
    """Returns the block spec of an array [N, E]."""
    return self._block((self.state_size, self.tile), lambda b, g, e: (0, e))

  def vector(self) -> Any:
    """Returns the block spec of an array [1, E]."""
    return self._block((1, self.tile), lambda b, g, e: (0, e))

  def wide(self, wide: Wide) -> Any:
    """Returns the block specs of E numbers a token."""
    if not isinstance(wide, LowRank):
      return self.channels()
    blocks: Any = LowRank
    up_RE = self._block((wide.rank, self.tile), lambda b, g, e: (0, e))
    return blocks(self.tokens(wide.rank), up_RE)

  def source(self, source: Source) -> Any:
    """Returns the block specs of a recurrence's inputs."""
    blocks: Any = Source
    return blocks(
        dt=self.wide(source.dt),
        bias_E=None if source.bias_E is None else self.vector(),
        a_NE=self.rates(),
        x_BTE=self.channels(),
        b_BTN=self.tokens(self.state_size),
        c_BTN=self.tokens(self.state_size),
        initial_BNE=self.row_states(before=True),
        gate=source.gate,
    )

  def epilogue(self, epilogue: Epilogue) -> Any:
    """Returns the block specs of an epilogue."""
    whole: Any = self.channels()
    return dataclasses.replace(
        epilogue,
        skip=None if epilogue.skip is None else self.vector(),
        x=None if epilogue.x is None else whole,
        z=None if epilogue.z is None else whole,
    )

  def wide_gradient(self, wide: Wide) -> tuple[Any, Any]:
    """Returns the shapes and block specs of the gradient of E numbers a token.

    That of a product's second factor is of one row, in float32.
    """
    shape: Any = jax.tree.map(_like, wide)
    if not isinstance(wide, LowRank):
      return shape, self.channels()
    return (
        dataclasses.replace(shape, up_RE=float32(self.batch, *wide.up_RE.shape)),
        dataclasses.replace(
            self.wide(wide), up_RE=self.row_states(before=True, rows=wide.rank)
        ),
    )

  def source_gradient(self, source: Source) -> tuple[Any, Any]:
    """Returns the shapes and block specs of a recurrence's gradient, that of one row for A, bias.

    Sums over tokens are float32.
    """
    shape: Any = jax.tree.map(_like, source)
    has_bias = source.bias_E is not None
    dt, dt_blocks = self.wide_gradient(source.dt)
    return dataclasses.replace(
        shape,
        dt=dt,
        a_NE=float32(self.batch, *source.a_NE.shape),
        bias_E=float32(self.batch, 1, source.a_NE.shape[1]) if has_bias else None,
    ), dataclasses.replace(
        self.source(source),
        dt=dt_blocks,
        a_NE=self.row_states(before=True),
        bias_E=self.row_states(before=True, rows=1) if has_bias else None,
    )

  def epilogue_gradient(self, epilogue: Epilogue) -> tuple[Any, Any]:
    """Returns the shapes and block specs of an epilogue's gradient, that of one row for `skip`."""
    shape: Any = jax.tree.map(_like, epilogue)
    if epilogue.skip is None:
      return shape, self.epilogue(epilogue)
    return (
        dataclasses.replace(shape, skip=float32(self.batch, 1, self.tiles * self.tile)),
        dataclasses.replace(
            self.epilogue(epilogue), skip=self.row_states(before=True, rows=1)
        ),
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
      cost: tuple[int, int, int],
      interpret: bool,
  ) -> PyTree:
    """Runs a kernel at each point of the grid.

    Args:
      kernel: takes references to the inputs, the outputs and the scratch memory.
      inputs: pairs of arrays and their block specs.
      outputs: pairs of shapes and their block specs.
      scratch: the kernel's scratch memory.
      cost: total floating-point operations outside matmuls, exponentials, and operations in
        matmuls.
      interpret: true to run without a TPU.

    Returns:
      The outputs.
    """
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    moved = jax.tree.leaves((arrays, shapes))
    costs = KernelCost(
        matmul_flops=cost[2], flops=cost[0], transcendentals=cost[1],
        bytes_accessed=sum(leaf.size * leaf.dtype.itemsize for leaf in moved),
    )
    with costs.scope():
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
          cost_estimate=costs.estimate(),
          interpret=interpret,
      )(*arrays)
