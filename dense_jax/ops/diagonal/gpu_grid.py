"""The grid of selective kernels for GPUs, and each program's blocks of arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dense_jax.ops.diagonal.gpu_kernels import Masks
from dense_jax.ops.diagonal.kernel_inputs import LowRank, Source, Wide
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.types import PyTree

# With 2 warps, and groups of 2 tokens in the backward pass, mamba 350M's backward kernel takes 0.86
# of its time with 4 and 4, on an H200; 4 warps and groups of 2 were not measured.
WARPS = 2
FLOAT32 = jnp.dtype("float32")


def float32(*shape: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of a float32 array."""
  return jax.ShapeDtypeStruct(shape, FLOAT32)


def _like(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


@dataclasses.dataclass(frozen=True)
class Grid:
  """The grid of a kernel (blocks of channels, rows), and each program's blocks of arrays."""

  batch: int
  time: int
  width: int
  state_size: int
  block: int

  @classmethod
  def of(cls, source: Source, block: int) -> Self:
    """Returns the grid for padded arrays."""
    batch, time, width = source.x_BTE.shape
    return cls(batch, time, width, source.a_NE.shape[0], block)

  @property
  def blocks(self) -> int:
    """The number of blocks of channels."""
    return self.width // self.block

  def row_channels(self, *middle: int) -> Any:
    """Returns the block of an array [B, ..., E], given its other axes' sizes."""
    return pl.BlockSpec(
        (None, *middle, self.block), lambda e, b: (b, *(0,) * len(middle), e)
    )

  def channels(self, *leading: int) -> Any:
    """Returns the block of an array [..., E], the same for all rows."""
    return pl.BlockSpec((*leading, self.block), lambda e, b: (*(0,) * len(leading), e))

  def tokens(self, *last: int) -> Any:
    """Returns the block of an array [B, T, ...], the same for all channels."""
    return pl.BlockSpec((None, self.time, *last), lambda e, b: (b, 0, *(0,) * len(last)))

  def own(self, *rest: int) -> Any:
    """Returns the block of an array [E / block, B, ...], which is a program's own."""
    return pl.BlockSpec((None, None, *rest), lambda e, b: (e, b, *(0,) * len(rest)))

  def wide(self, wide: Wide) -> Any:
    """Returns the blocks of E numbers a token."""
    if not isinstance(wide, LowRank):
      return self.row_channels(self.time)
    blocks: Any = LowRank
    return blocks(self.tokens(wide.rank), self.channels(wide.rank))

  def source(self, source: Source) -> Any:
    """Returns the blocks of a recurrence."""
    blocks: Any = Source
    maps = self.tokens(self.state_size)
    return blocks(
        dt=self.wide(source.dt),
        bias_E=None if source.bias_E is None else self.channels(),
        a_NE=self.channels(self.state_size),
        x_BTE=self.row_channels(self.time),
        b_BTN=maps,
        c_BTN=maps,
        initial_BNE=self.row_channels(self.state_size),
        gate=source.gate,
    )

  def epilogue(self, epilogue: Epilogue) -> Any:
    """Returns the blocks of an epilogue."""
    whole: Any = self.row_channels(self.time)
    return dataclasses.replace(
        epilogue,
        skip=None if epilogue.skip is None else self.channels(),
        x=None if epilogue.x is None else whole,
        z=None if epilogue.z is None else whole,
    )

  def masks(self, masks: Masks) -> Any:
    """Returns the blocks of masks."""
    return jax.tree.map(lambda _: self.tokens(), masks)

  def numbers(self) -> tuple[Any, Any]:
    """Returns the numbers of a block's channels, with their block."""
    return jnp.arange(self.block, dtype=jnp.int32), pl.BlockSpec((self.block,), lambda e, b: (0,))

  def wide_gradient(self, wide: Wide) -> tuple[Any, Any]:
    """Returns the shape and block of the gradient of E numbers a token, before that of factors."""
    shape = self.batch, self.time, self.width
    return jax.ShapeDtypeStruct(shape, wide.dtype), self.row_channels(self.time)

  def scratch(self, *shape: int, dtype: jnp.dtype = FLOAT32) -> tuple[Any, Any]:
    """Returns the shape and block of memory that is a program's own."""
    shapes = jax.ShapeDtypeStruct((self.blocks, self.batch, *shape), dtype)
    return shapes, self.own(*shape)

  def product(self, wide: Wide, chunk: int) -> tuple[Any, Any]:
    """Returns the shape and block of a chunk of a product; None for an array."""
    if not isinstance(wide, LowRank):
      return None, None
    return self.scratch(chunk, self.block, dtype=wide.dtype)

  def source_gradient(self, source: Source) -> tuple[Any, Any]:
    """Returns the shapes and blocks of a recurrence's gradient, before sums over programs."""
    dt, dt_block = self.wide_gradient(source.dt)
    shape: Any = jax.tree.map(_like, dataclasses.replace(source, dt=dt))
    maps = jax.ShapeDtypeStruct((self.blocks, *source.b_BTN.shape), source.b_BTN.dtype)
    queries = jax.ShapeDtypeStruct(maps.shape, source.c_BTN.dtype)
    own = self.own(self.time, self.state_size)
    has_bias = source.bias_E is not None
    return dataclasses.replace(
        shape, a_NE=float32(self.batch, *source.a_NE.shape), b_BTN=maps, c_BTN=queries,
        bias_E=float32(self.batch, self.width) if has_bias else None,
    ), dataclasses.replace(
        self.source(source), dt=dt_block, a_NE=self.row_channels(self.state_size), b_BTN=own,
        c_BTN=own, bias_E=self.row_channels() if has_bias else None,
    )

  def epilogue_gradient(self, epilogue: Epilogue) -> tuple[Any, Any]:
    """Returns the shapes and blocks of an epilogue's gradient, before sums over programs."""
    shape: Any = jax.tree.map(_like, epilogue)
    if epilogue.skip is None:
      return shape, self.epilogue(epilogue)
    return (
        dataclasses.replace(shape, skip=float32(self.batch, self.width)),
        dataclasses.replace(self.epilogue(epilogue), skip=self.row_channels()),
    )

  def call(
      self,
      kernel: Callable[..., None],
      inputs: Sequence[tuple[PyTree, PyTree]],
      outputs: Sequence[tuple[PyTree, PyTree]],
      work: tuple[int, int, int],
      interpret: bool,
  ) -> PyTree:
    """Runs a kernel for each row and block of channels.

    Args:
      kernel: takes references to the inputs and the outputs.
      inputs: pairs of arrays and their blocks.
      outputs: pairs of shapes and their blocks.
      work: floating-point operations and exponentials for each number of a state and token, and
        the operations of all matmuls.
      interpret: true to run without a GPU.

    Returns:
      The outputs.
    """
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    numbers = self.batch * self.time * self.width * self.state_size
    cost = KernelCost(
        matmul_flops=work[2], flops=work[0] * numbers, transcendentals=work[1] * numbers,
        bytes_accessed=sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((arrays, shapes))
        ),
    )
    with cost.scope():
      return pl.pallas_call(
          kernel,
          out_shape=shapes,
          grid=(self.blocks, self.batch),
          in_specs=in_specs,
          out_specs=out_specs,
          compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
          cost_estimate=cost.estimate(),
          interpret=interpret,
      )(*arrays)
