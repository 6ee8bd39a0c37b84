"""The selective diagonal recurrences of a layer and its sources, and what follows, on a GPU.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = sum over sources of g_t (C_t h_t)
    result_t = (y_t + D x_t) silu(z_t)

One program runs one row's block of channels through all tokens, with its states in registers, so
that memory is read and written once. Under differentiation the forward pass writes the state before
each chunk, and the backward kernel recomputes a chunk's states from it: twice, since only those
before each group of a few tokens are kept, in memory that stays in the GPU's L2 cache.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dense_jax.ops.chunks import pad_time
from dense_jax.ops.diagonal.gpu_backward import (
    GROUP_BACK,
    Scratch,
    backward_kernel,
    synchronise,
)
from dense_jax.ops.diagonal.gpu_kernels import GROUP, Masks, forward_kernel
from dense_jax.ops.diagonal.kernel_inputs import Padding, Source
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.types import Array, PyTree

# Channels of a program, one for each of its threads: sums over N stay inside a thread.
BLOCK = 128
WARPS = 4
# Tokens between states that are kept for the backward pass. At N = 16 those of 64 tokens take half
# the memory of a bfloat16 input, and 256 programs' scratch memory fits the L2 cache of an H100.
DEFAULT_CHUNK = 64


def selective_finish(
    sources: Sequence[Source],
    epilogue: Epilogue,
    resets_BT: Array | None,
    valid_BT: Array | None,
    *,
    chunk: int = 0,
    interpret: bool = False,
) -> tuple[Array, Array]:
  """Computes the epilogue of the sum of gated reads of selective recurrences.

  Differentiable in every array of every source and of the epilogue. Each gradient has its input's
  dtype, and all sums are float32.

  Args:
    sources: the recurrences, at least one, all with the same B, T, E and N.
    epilogue: what follows, without moments; if it has `skip` and no x, x is that of the first
      source.
    resets_BT: bool, true where all states are cleared before the token; None means never.
    valid_BT: bool, false where step sizes made in the kernel are zero; None means all true.
    chunk: tokens between the states that are kept for the backward pass, rounded up to a multiple
      of 8; 0 means DEFAULT_CHUNK.
    interpret: true to run the kernels without a GPU, for tests.

  Returns:
    The result [B, T, E] in the epilogue's dtype, and final_BNE, the first source's state after the
    last token, float32.
  """
  batch, time, width = sources[0].x_BTE.shape
  state_size = sources[0].a_NE.shape[0]
  assert not epilogue.moments
  for source in sources:
    source.check(sources[0])

  chunk = min(chunk or DEFAULT_CHUNK, time)
  chunk += -chunk % GROUP
  if valid_BT is None and time % chunk:
    valid_BT = jnp.ones((batch, time), bool)
  masks = Masks(
      None if resets_BT is None else jnp.where(pad_time(resets_BT, chunk), 0.0, 1.0),
      None if valid_BT is None else pad_time(valid_BT, chunk).astype(jnp.float32),
  )
  # Triton's arrays have sizes that are powers of two.
  block = min(BLOCK, pl.next_power_of_2(width))
  size = Padding(chunk, -width % block, pl.next_power_of_2(state_size) - state_size)
  y_BTE, final_BNE = _finish(
      tuple(map(size.source, sources)), size.epilogue(epilogue), masks, (chunk, block, interpret)
  )
  return y_BTE[:, :time, :width], final_BNE[:, :state_size, :width]


@dataclasses.dataclass(frozen=True)
class _Grid:
  """The grid of a kernel (blocks of channels, rows), and each program's blocks of arrays."""

  batch: int
  time: int
  width: int
  state_size: int
  block: int

  @classmethod
  def of(cls, source: Source, block: int) -> "_Grid":
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

  def source(self, source: Source) -> Any:
    """Returns the blocks of a recurrence."""
    blocks: Any = Source
    whole, maps = self.row_channels(self.time), self.tokens(self.state_size)
    return blocks(
        dt_BTE=whole,
        bias_E=None if source.bias_E is None else self.channels(),
        a_NE=self.channels(self.state_size),
        x_BTE=whole,
        b_BTN=maps,
        c_BTN=maps,
        gate_BTE=None if source.gate_BTE is None else whole,
        initial_BNE=self.row_channels(self.state_size),
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

  def source_gradient(self, source: Source) -> tuple[Any, Any]:
    """Returns the shapes and blocks of a recurrence's gradient, before sums over programs."""
    shape: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), source)
    maps = _float32(self.blocks, *source.b_BTN.shape)
    own = self.own(self.time, self.state_size)
    has_bias = source.bias_E is not None
    return dataclasses.replace(
        shape, a_NE=_float32(self.batch, *source.a_NE.shape), b_BTN=maps, c_BTN=maps,
        bias_E=_float32(self.batch, self.width) if has_bias else None,
    ), dataclasses.replace(
        self.source(source), a_NE=self.row_channels(self.state_size), b_BTN=own, c_BTN=own,
        bias_E=self.row_channels() if has_bias else None,
    )

  def epilogue_gradient(self, epilogue: Epilogue) -> tuple[Any, Any]:
    """Returns the shapes and blocks of an epilogue's gradient, before sums over programs."""
    shape: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), epilogue)
    if epilogue.skip is None:
      return shape, self.epilogue(epilogue)
    return (
        dataclasses.replace(shape, skip=_float32(self.batch, self.width)),
        dataclasses.replace(self.epilogue(epilogue), skip=self.row_channels()),
    )

  def call(
      self,
      kernel: Callable[..., None],
      inputs: Sequence[tuple[PyTree, PyTree]],
      outputs: Sequence[tuple[PyTree, PyTree]],
      work: tuple[int, int],
      interpret: bool,
  ) -> PyTree:
    """Runs a kernel for each row and block of channels.

    Args:
      kernel: takes references to the inputs and the outputs.
      inputs: pairs of arrays and their blocks.
      outputs: pairs of shapes and their blocks.
      work: floating-point operations and exponentials for each number of a state and token.
      interpret: true to run without a GPU.

    Returns:
      The outputs.
    """
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    numbers = self.batch * self.time * self.width * self.state_size
    cost = KernelCost(
        matmul_flops=0, flops=work[0] * numbers, transcendentals=work[1] * numbers,
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


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _forward(
    sources: tuple[Source, ...], epilogue: Epilogue, masks: Masks, options: tuple[int, int, bool],
    *, save: bool,
) -> tuple[Array, Array, tuple[Array, ...]]:
  chunk, block, interpret = options
  grid = _Grid.of(sources[0], block)
  batch, time, width, size = grid.batch, grid.time, grid.width, grid.state_size
  saved = len(sources) if save else 0
  return grid.call(
      functools.partial(forward_kernel, chunk=chunk),
      [
          (sources, tuple(map(grid.source, sources))),
          (epilogue, grid.epilogue(epilogue)),
          (masks, grid.masks(masks)),
          grid.numbers(),
      ],
      [
          (jax.ShapeDtypeStruct((batch, time, width), epilogue.dtype), grid.row_channels(time)),
          (_float32(batch, size, width), grid.row_channels(size)),
          (
              (_float32(batch, time // chunk, size, width),) * saved,
              (grid.row_channels(time // chunk, size),) * saved,
          ),
      ],
      (6 * len(sources), len(sources)),
      interpret,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _finish(
    sources: tuple[Source, ...], epilogue: Epilogue, masks: Masks, options: tuple[int, int, bool]
) -> tuple[Array, Array]:
  y_BTE, final_BNE, _ = _forward(sources, epilogue, masks, options, save=False)
  return y_BTE, final_BNE


def _finish_forward(
    sources: tuple[Source, ...], epilogue: Epilogue, masks: Masks, options: tuple[int, int, bool]
) -> tuple[tuple[Array, Array], PyTree]:
  y_BTE, final_BNE, before = _forward(sources, epilogue, masks, options, save=True)
  return (y_BTE, final_BNE), (sources, epilogue, masks, before)


def _finish_backward(
    options: tuple[int, int, bool], saved: PyTree, cotangents: tuple[Array, Array]
) -> tuple[tuple[Source, ...], Epilogue, None]:
  chunk, block, interpret = options
  sources, epilogue, masks, before = saved
  dy_BTE, dfinal_BNE = cotangents
  grid = _Grid.of(sources[0], block)
  time, size = grid.time, grid.state_size
  shapes, blocks = zip(*map(grid.source_gradient, sources), strict=True)
  states = chunk // GROUP_BACK, size, block
  reads = None if epilogue.z is None else (chunk, block)
  scratch: Any = Scratch

  def own(*shape: int) -> jax.ShapeDtypeStruct:
    return _float32(grid.blocks, grid.batch, *shape)

  gradients, depilogue, _ = grid.call(
      functools.partial(
          backward_kernel, chunk=chunk, barrier=(lambda: None) if interpret else synchronise
      ),
      [
          (sources, tuple(map(grid.source, sources))),
          (epilogue, grid.epilogue(epilogue)),
          (masks, grid.masks(masks)),
          grid.numbers(),
          (before, (grid.row_channels(time // chunk, size),) * len(sources)),
          (dy_BTE, grid.row_channels(time)),
          (dfinal_BNE, grid.row_channels(size)),
      ],
      [
          (shapes, blocks),
          grid.epilogue_gradient(epilogue),
          (
              scratch(own(*states), reads and own(*reads)),
              scratch(grid.own(*states), reads and grid.own(*reads)),
          ),
      ],
      # The states are recomputed twice; the adjoint takes 16 operations.
      (26 * len(sources), 2 * len(sources)),
      interpret,
  )
  return tuple(map(_complete, sources, gradients)), dataclasses.replace(
      depilogue, skip=None if epilogue.skip is None else jnp.sum(depilogue.skip, axis=0)
  ), None


def _complete(source: Source, gradient: Any) -> Source:
  """Sums a recurrence's gradient over the programs that share an array."""
  has_bias = gradient.bias_E is not None
  return dataclasses.replace(
      gradient,
      a_NE=jnp.sum(gradient.a_NE, axis=0),
      bias_E=jnp.sum(gradient.bias_E, axis=0) if has_bias else None,
      b_BTN=jnp.sum(gradient.b_BTN, axis=0).astype(source.b_BTN.dtype),
      c_BTN=jnp.sum(gradient.c_BTN, axis=0).astype(source.c_BTN.dtype),
  )


_finish.defvjp(_finish_forward, _finish_backward)
