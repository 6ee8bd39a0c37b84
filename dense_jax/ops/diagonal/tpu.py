"""The selective diagonal recurrences of a layer and its sources, and what follows, on a TPU.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = sum over sources of g_t (C_t h_t)
    result_t = (y_t + D x_t) silu(z_t)

States stay in VMEM. Under differentiation, the forward pass writes only the state before each
chunk to HBM, and the backward kernel recomputes the others. The grid visits the chunks of a row
one after the other and, within a chunk, the tiles of E. So B and C are fetched once per chunk,
their gradients (sums over E) are complete at the chunk's end, and the states of all channels
(N x E numbers per source) stay in scratch memory until the next chunk. Likewise products of low
rank, of which step sizes and gates are made, exist in VMEM alone, and so do their gradients, which
are multiplied by the factors there.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dense_jax.ops.chunks import pad_time, round_up
from dense_jax.ops.diagonal.kernel_inputs import (
    LowRank,
    Padding,
    Source,
    Wide,
    check_inputs,
    matmul_flops,
    products,
    rounded,
)
from dense_jax.ops.diagonal.tpu_backward import Scratch, backward_kernel
from dense_jax.ops.diagonal.tpu_grid import LANES, TILE, Grid, float32
from dense_jax.ops.diagonal.tpu_kernels import GROUP, forward_kernel
from dense_jax.ops.epilogue import Epilogue
from dense_jax.types import Array, PyTree

# Limit of the backward kernel's blocks, out of the 16 MB that the compiler grants by default.
VMEM_BYTES = 10 * 2**20
# Longer chunks would save little memory: at 128 and N = 16 the saved states are 1/4 of x.
MAX_CHUNK = 128


def selective_finish(
    sources: Sequence[Source],
    gates: Sequence[Wide],
    epilogue: Epilogue,
    resets_BT: Array | None,
    valid_BT: Array | None,
    *,
    chunk: int = 0,
    interpret: bool = False,
) -> tuple[Array, Array]:
  """Computes a `SelectiveFinish` on a TPU, by default with the longest chunks that fit VMEM."""
  batch, time, width = sources[0].x_BTE.shape
  check_inputs(sources, gates, epilogue, resets_BT, valid_BT)

  chunk = round_up(min(chunk or _default_chunk(sources, gates), time), GROUP)
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
      tuple(map(padding.wide, gates)), _as_blocks(padding.epilogue(epilogue)), masks_BT2, chunk,
      interpret,
  )
  return y_BTE[:, :time, :width], final_BNE[..., :width]


def _as_blocks(arrays: PyTree) -> PyTree:
  """Makes vectors [E] to arrays [1, E], of which a kernel takes blocks."""
  return jax.tree.map(lambda x: x[None] if x.ndim == 1 else x, arrays)


def _default_chunk(sources: Sequence[Source], gates: Sequence[Wide]) -> int:
  """Returns the longest chunk, in tokens, with which the backward kernel fits VMEM_BYTES."""
  state_size, width = sources[0].a_NE.shape
  state_rows, state_lanes = round_up(state_size, 8), round_up(state_size, LANES)
  size, count, low = sources[0].x_BTE.dtype.itemsize, len(sources), products(sources, gates)
  rank_lanes = [round_up(product.rank, LANES) for product in low]
  # Bytes per token: each source's x and dt, arrays of gates, y and z, all with their gradients;
  # maps and first factors with theirs; the masks. They are double-buffered.
  wide = 2 * (2 * count + len(gates) - len(low) + 2)
  moving = size * (wide * TILE + 4 * count * state_lanes + 2 * sum(rank_lanes)) + 4 * LANES
  # A chunk's states, reads, products and sums over tiles stay.
  staying = TILE * (state_rows + 1 + len(gates) + len(low)) + 2 * count * state_lanes
  token = 2 * moving + 4 * (staying + sum(rank_lanes))
  waiting = 4 * width * (2 * count * state_rows + sum(product.rank for product in low))
  chunk = MAX_CHUNK
  while chunk > GROUP and waiting + chunk * token > VMEM_BYTES:
    chunk //= 2  # Most lengths are multiples of a power of two and then need no padding.
  return chunk


def _inputs(
    grid: Grid, sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue,
    masks_BT2: Array | None,
) -> list[tuple[PyTree, PyTree]]:
  """Returns the arrays that both kernels take, with their block specs."""
  sources = tuple(dataclasses.replace(source, dt=rounded(source.dt)) for source in sources)
  return [
      (sources, tuple(map(grid.source, sources))),
      (tuple(map(rounded, gates)), tuple(map(grid.wide, gates))),
      (epilogue, grid.epilogue(epilogue)),
      (masks_BT2, None if masks_BT2 is None else grid.tokens(2)),
  ]


def _numbers(sources: tuple[Source, ...]) -> int:
  """Returns how many numbers of a state are computed over all tokens."""
  return len(sources) * sources[0].x_BTE.size * sources[0].a_NE.shape[0]


def _products(grid: Grid, sources: tuple[Source, ...], gates: tuple[Wide, ...]) -> Any:
  """Returns scratch memory for a chunk and tile of each product; None without any."""
  count = len(products(sources, gates))
  return pltpu.VMEM((count, grid.chunk, grid.tile), jnp.float32) if count else None


def _forward(
    sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue,
    masks_BT2: Array | None, chunk: int, interpret: bool, *, save: bool,
) -> tuple[Array, Array, tuple[Array, ...]]:
  grid = Grid.of(sources[0], chunk)
  batch, time, width = sources[0].x_BTE.shape
  size, numbers = grid.state_size, _numbers(sources)
  saved = len(sources) if save else 0
  return grid.call(
      forward_kernel,
      _inputs(grid, sources, gates, epilogue, masks_BT2),
      [
          (jax.ShapeDtypeStruct((batch, time, width), epilogue.dtype), grid.channels()),
          (float32(batch, size, width), grid.row_states(before=False)),
          ((float32(batch, grid.chunks, size, width),) * saved, (grid.states(),) * saved),
      ],
      [grid.waiting(len(sources)), _products(grid, sources, gates)],
      (6 * numbers, numbers, matmul_flops(sources, gates)),
      interpret,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _finish(
    sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue,
    masks_BT2: Array | None, chunk: int, interpret: bool,
) -> tuple[Array, Array]:
  return _forward(sources, gates, epilogue, masks_BT2, chunk, interpret, save=False)[:2]


def _finish_forward(
    sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue,
    masks_BT2: Array | None, chunk: int, interpret: bool,
) -> tuple[tuple[Array, Array], PyTree]:
  y_BTE, final_BNE, before = _forward(
      sources, gates, epilogue, masks_BT2, chunk, interpret, save=True
  )
  return (y_BTE, final_BNE), (sources, gates, epilogue, masks_BT2, before)


def _finish_backward(
    chunk: int, interpret: bool, saved: PyTree, cotangents: tuple[Array, Array]
) -> tuple[tuple[Source, ...], tuple[Wide, ...], Epilogue, None]:
  sources, gates, epilogue, masks_BT2, before = saved
  dy_BTE, dfinal_BNE = cotangents
  grid = Grid.of(sources[0], chunk, reverse=True)
  numbers, count = _numbers(sources), len(sources)
  shapes, blocks = zip(*map(grid.source_gradient, sources), strict=True)
  dgates = [grid.wide_gradient(gate) for gate in gates]
  found, found_gates, depilogue = grid.call(
      backward_kernel,
      [
          *_inputs(grid, sources, gates, epilogue, masks_BT2),
          (before, (grid.states(),) * count),
          (dy_BTE, grid.channels()),
          (dfinal_BNE, grid.row_states(before=False)),
      ],
      [
          (shapes, blocks),
          (tuple(shape for shape, _ in dgates), tuple(block for _, block in dgates)),
          grid.epilogue_gradient(epilogue),
      ],
      [_scratch(grid, sources, gates, epilogue)],
      # The steps and their decays are recomputed; the adjoint takes 16 operations.
      (23 * numbers, 2 * numbers, 3 * matmul_flops(sources, gates)),
      interpret,
  )
  return (
      tuple(map(_complete, found)),
      tuple(map(_complete_wide, found_gates)),
      dataclasses.replace(
          depilogue, skip=None if epilogue.skip is None else jnp.sum(depilogue.skip, axis=0)
      ),
      None,
  )


def _scratch(
    grid: Grid, sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue
) -> Scratch:
  """Returns the backward kernel's scratch memory."""
  count, low = len(sources), products(sources, gates)

  def memory(*shape: int) -> Any:
    return pltpu.VMEM(shape, jnp.float32)

  has_own = epilogue.z is not None and any(source.gate is None for source in sources)
  return Scratch(
      states=memory(grid.chunk + 1, grid.state_size, grid.tile),
      own=memory(grid.chunk, grid.tile) if has_own else None,
      gated=memory(len(gates), grid.chunk, grid.tile) if gates else None,
      products=_products(grid, sources, gates),
      carry=grid.waiting(count),
      da=grid.waiting(count),
      dvectors=memory(count + 1, grid.tiles, 1, grid.tile),
      dmaps=memory(2 * count, grid.chunk, grid.state_size),
      dhidden=tuple(memory(grid.chunk, product.rank) for product in low),
      dup=tuple(memory(grid.tiles, product.rank, grid.tile) for product in low),
  )


def _complete(gradient: Any) -> Source:
  """Sums a recurrence's gradient over rows."""
  has_bias = gradient.bias_E is not None
  return dataclasses.replace(
      gradient,
      dt=_complete_wide(gradient.dt),
      a_NE=jnp.sum(gradient.a_NE, axis=0),
      bias_E=jnp.sum(gradient.bias_E, axis=0) if has_bias else None,
  )


def _complete_wide(gradient: Any) -> Wide:
  """Sums the gradient of a product's second factor over rows."""
  if not isinstance(gradient, LowRank):
    return gradient
  return dataclasses.replace(gradient, up_RE=jnp.sum(gradient.up_RE, axis=0))


_finish.defvjp(_finish_forward, _finish_backward)
