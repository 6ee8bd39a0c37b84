"""The selective diagonal recurrences of a layer and its sources, and what follows, on a TPU.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = sum over sources of g_t (C_t h_t)
    result_t = (y_t + D x_t) silu(z_t)

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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dense_jax.ops.chunks import pad_time
from dense_jax.ops.diagonal.kernel_inputs import Padding, Source
from dense_jax.ops.diagonal.tpu_kernels import GROUP, backward_kernel, forward_kernel
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.kernel_cost import KernelCost
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
    chunk: tokens between the states that are kept for the backward pass, rounded up to a
      multiple of 16; 0 means the longest chunk that fits VMEM.
    interpret: true to run the kernels without a TPU, for tests.

  Returns:
    The result [B, T, E] in the epilogue's dtype, and final_BNE, the first source's state after the
    last token, float32.
  """
  batch, time, width = sources[0].x_BTE.shape
  assert not epilogue.moments
  for source in sources:
    source.check(sources[0])

  chunk = min(chunk or _default_chunk(sources), time)
  chunk += -chunk % GROUP
  masks_BT2 = None
  if resets_BT is not None or valid_BT is not None or time % chunk:
    ones = jnp.ones((batch, time), bool)
    keep_BT = ones if resets_BT is None else ~resets_BT
    valid_BT = ones if valid_BT is None else valid_BT
    keep_BT = ~pad_time(~keep_BT, chunk)
    masks_BT2 = jnp.stack([keep_BT, pad_time(valid_BT, chunk)], axis=-1).astype(jnp.float32)
  padding = Padding(chunk, -width % LANES)
  y_BTE, final_BNE = _finish(
      tuple(_as_blocks(padding.source(source)) for source in sources),
      _as_blocks(padding.epilogue(epilogue)), masks_BT2, chunk, interpret,
  )
  return y_BTE[:, :time, :width], final_BNE[..., :width]


def _as_blocks(arrays: PyTree) -> PyTree:
  """Makes vectors [E] to arrays [1, E], of which a kernel takes blocks."""
  return jax.tree.map(lambda x: x[None] if x.ndim == 1 else x, arrays)


def _default_chunk(sources: Sequence[Source]) -> int:
  """Returns the longest chunk, in tokens, with which the backward kernel fits VMEM_BYTES."""
  state_size, width = sources[0].a_NE.shape
  state_rows = state_size + -state_size % 8
  state_lanes = state_size + -state_size % LANES
  # Bytes per token: each source's dt, x, gate and their gradients; y and z with theirs; maps and
  # their gradients in float32, with the masks.
  size = sources[0].x_BTE.dtype.itemsize
  moving = size * TILE * (6 * len(sources) + 4) + 4 * (4 * len(sources) * state_lanes + LANES)
  # Streamed blocks are double-buffered; a chunk's states and reads stay.
  token = 2 * moving + 4 * (state_rows + 1) * TILE
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

  def source(self, source: Source) -> Any:
    """Returns the block specs of a recurrence's inputs."""
    blocks: Any = Source
    return blocks(
        dt_BTE=self.channels(),
        bias_E=None if source.bias_E is None else self.vector(),
        a_NE=self.rates(),
        x_BTE=self.channels(),
        b_BTN=self.tokens(self.state_size),
        c_BTN=self.tokens(self.state_size),
        gate_BTE=None if source.gate_BTE is None else self.channels(),
        initial_BNE=self.row_states(before=True),
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

  def source_gradient(self, source: Source) -> tuple[Any, Any]:
    """Returns the shapes and block specs of a recurrence's gradient, that of one row for A, bias.

    Sums over tokens or channels are float32 until complete.
    """
    shape: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), source)
    has_bias = source.bias_E is not None
    return dataclasses.replace(
        shape,
        a_NE=_float32(self.batch, *source.a_NE.shape),
        bias_E=_float32(self.batch, 1, source.a_NE.shape[1]) if has_bias else None,
        b_BTN=_float32(*source.b_BTN.shape),
        c_BTN=_float32(*source.c_BTN.shape),
    ), dataclasses.replace(
        self.source(source),
        a_NE=self.row_states(before=True),
        bias_E=self.row_states(before=True, rows=1) if has_bias else None,
    )

  def epilogue_gradient(self, epilogue: Epilogue) -> tuple[Any, Any]:
    """Returns the shapes and block specs of an epilogue's gradient, that of one row for `skip`."""
    shape: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), epilogue)
    if epilogue.skip is None:
      return shape, self.epilogue(epilogue)
    return (
        dataclasses.replace(shape, skip=_float32(self.batch, 1, self.tiles * self.tile)),
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
    costs = KernelCost(
        matmul_flops=0, flops=cost[0], transcendentals=cost[1],
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


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _inputs(
    grid: _Grid, sources: tuple[Source, ...], epilogue: Epilogue, masks_BT2: Array | None
) -> list[tuple[PyTree, PyTree]]:
  return [
      (sources, tuple(map(grid.source, sources))),
      (epilogue, grid.epilogue(epilogue)),
      (masks_BT2, None if masks_BT2 is None else grid.tokens(2)),
  ]


def _numbers(sources: tuple[Source, ...]) -> int:
  """Returns how many numbers of a state are computed over all tokens."""
  return len(sources) * sources[0].x_BTE.size * sources[0].a_NE.shape[0]


def _forward(
    sources: tuple[Source, ...], epilogue: Epilogue, masks_BT2: Array | None, chunk: int,
    interpret: bool, *, save: bool,
) -> tuple[Array, Array, tuple[Array, ...]]:
  grid = _Grid.of(sources[0], chunk)
  batch, time, width = sources[0].x_BTE.shape
  size, numbers = grid.state_size, _numbers(sources)
  saved = len(sources) if save else 0
  return grid.call(
      forward_kernel,
      _inputs(grid, sources, epilogue, masks_BT2),
      [
          (jax.ShapeDtypeStruct((batch, time, width), epilogue.dtype), grid.channels()),
          (_float32(batch, size, width), grid.row_states(before=False)),
          ((_float32(batch, grid.chunks, size, width),) * saved, (grid.states(),) * saved),
      ],
      [grid.waiting(len(sources))],
      (6 * numbers, numbers),
      interpret,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _finish(
    sources: tuple[Source, ...], epilogue: Epilogue, masks_BT2: Array | None, chunk: int,
    interpret: bool,
) -> tuple[Array, Array]:
  y_BTE, final_BNE, _ = _forward(sources, epilogue, masks_BT2, chunk, interpret, save=False)
  return y_BTE, final_BNE


def _finish_forward(
    sources: tuple[Source, ...], epilogue: Epilogue, masks_BT2: Array | None, chunk: int,
    interpret: bool,
) -> tuple[tuple[Array, Array], PyTree]:
  y_BTE, final_BNE, before = _forward(sources, epilogue, masks_BT2, chunk, interpret, save=True)
  return (y_BTE, final_BNE), (sources, epilogue, masks_BT2, before)


def _finish_backward(
    chunk: int, interpret: bool, saved: PyTree, cotangents: tuple[Array, Array]
) -> tuple[tuple[Source, ...], Epilogue, None]:
  sources, epilogue, masks_BT2, before = saved
  dy_BTE, dfinal_BNE = cotangents
  grid = _Grid.of(sources[0], chunk, reverse=True)
  numbers, count = _numbers(sources), len(sources)
  shapes, blocks = zip(*map(grid.source_gradient, sources), strict=True)
  reads = None if epilogue.z is None else pltpu.VMEM((chunk, grid.tile), jnp.float32)
  gradients, depilogue = grid.call(
      backward_kernel,
      [
          *_inputs(grid, sources, epilogue, masks_BT2),
          (before, (grid.states(),) * count),
          (dy_BTE, grid.channels()),
          (dfinal_BNE, grid.row_states(before=False)),
      ],
      [(shapes, blocks), grid.epilogue_gradient(epilogue)],
      [
          pltpu.VMEM((chunk + 1, grid.state_size, grid.tile), jnp.float32),
          reads,
          grid.waiting(count),
          grid.waiting(count),
          pltpu.VMEM((count + 1, grid.tiles, 1, grid.tile), jnp.float32),
      ],
      # The steps and their decays are recomputed; the adjoint takes 16 operations.
      (23 * numbers, 2 * numbers),
      interpret,
  )
  return tuple(map(_complete, sources, gradients)), dataclasses.replace(
      depilogue, skip=None if epilogue.skip is None else jnp.sum(depilogue.skip, axis=0)
  ), None


def _complete(source: Source, gradient: Any) -> Source:
  """Sums a recurrence's gradient over rows, and returns it in its inputs' dtypes."""
  has_bias = gradient.bias_E is not None
  return dataclasses.replace(
      gradient,
      a_NE=jnp.sum(gradient.a_NE, axis=0),
      bias_E=jnp.sum(gradient.bias_E, axis=0) if has_bias else None,
      b_BTN=gradient.b_BTN.astype(source.b_BTN.dtype),
      c_BTN=gradient.c_BTN.astype(source.c_BTN.dtype),
  )


_finish.defvjp(_finish_forward, _finish_backward)
