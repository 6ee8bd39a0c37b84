"""The selective diagonal recurrences of a layer and its sources, and what follows, on a GPU.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = sum over sources of g_t (C_t h_t)
    result_t = (y_t + D x_t) silu(z_t)

One program runs one row's block of channels through all tokens, with its states in registers, so
that memory is read and written once. Under differentiation the forward pass writes the state before
each chunk, and the backward kernel recomputes a chunk's states from it: twice, since only those
before each group of a few tokens are kept, in memory that stays in the GPU's L2 cache. So do
products of low rank (of which step sizes and gates are made), a chunk at a time; their gradients
are written, and XLA multiplies those by the factors: sums of the weights' gradients in float32,
one for each block of channels and row, would move more.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.chunks import chunk_length, pad_time, round_up
from dense_jax.ops.diagonal.gpu_backward import GROUP_BACK, Scratch, backward_kernel
from dense_jax.ops.diagonal.gpu_grid import Grid, float32
from dense_jax.ops.diagonal.gpu_kernels import Masks, Products, forward_kernel, synchronise
from dense_jax.ops.diagonal.kernel_inputs import (
    LEAST,
    LowRank,
    Padding,
    Source,
    Wide,
    check_inputs,
    gradient,
    matmul_flops,
    rounded,
)
from dense_jax.ops.epilogue import Epilogue
from dense_jax.types import Array, PyTree

# Channels of a program, one for each thread of WARPS: sums over N stay inside a thread.
BLOCK = 64
# Tokens between states that are kept for the backward pass. At N = 16 those of 64 tokens take half
# the memory of a bfloat16 input.
DEFAULT_CHUNK = 64


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
  """Computes a `SelectiveFinish` on a GPU, by default with chunks of DEFAULT_CHUNK tokens."""
  batch, time, width = sources[0].x_BTE.shape
  state_size = sources[0].a_NE.shape[0]
  check_inputs(sources, gates, epilogue, resets_BT, valid_BT)

  chunk = round_up(chunk_length(chunk, DEFAULT_CHUNK, time), LEAST)
  if valid_BT is None and time % chunk:
    valid_BT = jnp.ones((batch, time), bool)
  masks = Masks(
      None if resets_BT is None else jnp.where(pad_time(resets_BT, chunk), 0.0, 1.0),
      None if valid_BT is None else pad_time(valid_BT, chunk).astype(jnp.float32),
  )
  # Triton's arrays have sizes that are powers of two.
  block = max(LEAST, min(BLOCK, pl.next_power_of_2(width)))
  size = Padding(chunk, -width % block, pl.next_power_of_2(state_size) - state_size)
  y_BTE, final_BNE = _finish(
      tuple(map(size.source, sources)), tuple(map(size.wide, gates)), size.epilogue(epilogue),
      masks, (chunk, block, interpret),
  )
  return y_BTE[:, :time, :width], final_BNE[:, :state_size, :width]


def _unzip(pairs: Iterable[tuple[Any, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Returns the first and the second of each pair."""
  first, second = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
  return first, second


def _inputs(
    grid: Grid, sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue,
    masks: Masks,
) -> list[tuple[PyTree, PyTree]]:
  """Returns the arrays that both kernels take, with their blocks."""
  sources = tuple(
      dataclasses.replace(source, dt=rounded(source.dt)) for source in sources
  )
  return [
      (sources, tuple(map(grid.source, sources))),
      (tuple(map(rounded, gates)), tuple(map(grid.wide, gates))),
      (epilogue, grid.epilogue(epilogue)),
      (masks, grid.masks(masks)),
      grid.numbers(),
  ]


def _barrier(interpret: bool) -> Callable[[], None]:
  return (lambda: None) if interpret else synchronise


def _forward(
    sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue, masks: Masks,
    options: tuple[int, int, bool], *, save: bool,
) -> tuple[Array, Array, tuple[Array, ...]]:
  chunk, block, interpret = options
  grid = Grid.of(sources[0], block)
  batch, time, width, size = grid.batch, grid.time, grid.width, grid.state_size
  saved = len(sources) if save else 0
  steps, step_blocks = _unzip(grid.product(source.dt, chunk) for source in sources)
  factors, factor_blocks = _unzip(grid.product(gate, chunk) for gate in gates)
  y_BTE, final_BNE, before, _ = grid.call(
      functools.partial(forward_kernel, chunk=chunk, barrier=_barrier(interpret)),
      _inputs(grid, sources, gates, epilogue, masks),
      [
          (jax.ShapeDtypeStruct((batch, time, width), epilogue.dtype), grid.row_channels(time)),
          (float32(batch, size, width), grid.row_channels(size)),
          (
              (float32(batch, time // chunk, size, width),) * saved,
              (grid.row_channels(time // chunk, size),) * saved,
          ),
          (Products(steps, factors), Products(step_blocks, factor_blocks)),
      ],
      (6 * len(sources), len(sources), matmul_flops(sources, gates)),
      interpret,
  )
  return y_BTE, final_BNE, before


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _finish(
    sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue, masks: Masks,
    options: tuple[int, int, bool],
) -> tuple[Array, Array]:
  return _forward(sources, gates, epilogue, masks, options, save=False)[:2]


def _finish_forward(
    sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue, masks: Masks,
    options: tuple[int, int, bool],
) -> tuple[tuple[Array, Array], PyTree]:
  y_BTE, final_BNE, before = _forward(sources, gates, epilogue, masks, options, save=True)
  return (y_BTE, final_BNE), (sources, gates, epilogue, masks, before)


def _finish_backward(
    options: tuple[int, int, bool], saved: PyTree, cotangents: tuple[Array, Array]
) -> tuple[tuple[Source, ...], tuple[Wide, ...], Epilogue, None]:
  chunk, block, interpret = options
  sources, gates, epilogue, masks, before = saved
  dy_BTE, dfinal_BNE = cotangents
  grid = Grid.of(sources[0], block)
  time, size = grid.time, grid.state_size
  dsources, dgates, depilogue, _ = grid.call(
      functools.partial(backward_kernel, chunk=chunk, barrier=_barrier(interpret)),
      [
          *_inputs(grid, sources, gates, epilogue, masks),
          (before, (grid.row_channels(time // chunk, size),) * len(sources)),
          (dy_BTE, grid.row_channels(time)),
          (dfinal_BNE, grid.row_channels(size)),
      ],
      [
          _unzip(map(grid.source_gradient, sources)),
          _unzip(map(grid.wide_gradient, gates)),
          grid.epilogue_gradient(epilogue),
          _scratch(grid, sources, gates, epilogue, chunk),
      ],
      # The states are recomputed twice; the adjoint takes 16 operations.
      (26 * len(sources), 2 * len(sources), matmul_flops(sources, gates)),
      interpret,
  )
  return (
      tuple(map(_complete, sources, dsources)),
      tuple(map(gradient, gates, dgates)),
      dataclasses.replace(
          depilogue, skip=None if epilogue.skip is None else jnp.sum(depilogue.skip, axis=0)
      ),
      None,
  )


def _scratch(
    grid: Grid, sources: tuple[Source, ...], gates: tuple[Wide, ...], epilogue: Epilogue,
    chunk: int,
) -> tuple[Any, Any]:
  """Returns the shapes and blocks of the backward kernel's scratch memory."""
  reads = grid.scratch(chunk, grid.block)
  has_own = epilogue.z is not None and any(source.gate is None for source in sources)
  # One source is done at a time.
  steps = [source.dt.dtype for source in sources if isinstance(source.dt, LowRank)]
  parts: dict[str, tuple[Any, Any]] = {
      "states": grid.scratch(chunk // GROUP_BACK, grid.state_size, grid.block),
      "steps": (None, None) if not steps else grid.scratch(
          chunk, grid.block, dtype=jnp.result_type(*steps)
      ),
      "gates": _unzip(grid.product(gate, chunk) for gate in gates),
      "own": reads if has_own else (None, None),
      "gated": ((reads[0],) * len(gates), (reads[1],) * len(gates)),
  }
  scratch: Any = Scratch
  return (
      scratch(**{name: shapes for name, (shapes, _) in parts.items()}),
      scratch(**{name: blocks for name, (_, blocks) in parts.items()}),
  )


def _complete(source: Source, found: Any) -> Source:
  """Sums a recurrence's gradient over the programs that share an array."""
  has_bias = found.bias_E is not None

  def over_blocks(d_BTN: Array) -> Array:
    return jnp.sum(d_BTN, axis=0, dtype=jnp.float32).astype(d_BTN.dtype)

  return dataclasses.replace(
      found,
      dt=gradient(source.dt, found.dt),
      a_NE=jnp.sum(found.a_NE, axis=0),
      bias_E=jnp.sum(found.bias_E, axis=0) if has_bias else None,
      b_BTN=over_blocks(found.b_BTN),
      c_BTN=over_blocks(found.c_BTN),
  )


_finish.defvjp(_finish_forward, _finish_backward)
