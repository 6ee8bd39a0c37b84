"""The short convolution with its activation on a GPU, whose gradients are one pass over memory.

    c_t = bias + sum_j kernel[W - 1 - j] x_{t-j}        y_t = silu(c_t)

XLA fuses the forward pass into one read and one write. Of the gradients it makes three passes, with
c written in between: those of the taps are sums over tokens, of which it computes two or three in
one kernel, and that of x needs the gradient of c at W tokens. Here a program recomputes c at these
tokens from x, so that x and the gradient of y are read once and the gradient of x is written once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dense_jax.ops import partition
from dense_jax.ops.chunks import pad_time, round_up
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.ops.short_conv import convolve, delays_by_padding
from dense_jax.ops.triton_functions import sigmoid
from dense_jax.types import Array, PyTree

# A tile's tokens, and its channels: 8 numbers of each array for each of 128 threads.
_TILE, _BLOCK, _WARPS = 16, 64, 4
# Tokens of a program, whose sums over tokens stay in registers.
_PART = 256


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """The sizes of a kernel: W taps, a program's channels and tokens, and a row's tokens, padded."""

  taps: int
  block: int
  part: int
  time: int


def gpu_convolve(
    x_BTE: Array, kernel_WE: Array, bias_E: Array, document_BT: Array | None,
    tail_BWE: Array | None, *, axis: str | None, interpret: bool = False,
) -> Array:
  """Computes `convolve`, with a kernel for its gradients.

  Args:
    x_BTE: inputs.
    kernel_WE: the taps.
    bias_E: the bias.
    document_BT: see `convolve`.
    tail_BWE: see `convolve`.
    axis: the mesh axis that splits channels; None means that every device has them all.
    interpret: true to run the kernel as ordinary JAX, on any platform.

  Returns:
    y_BTE, in x's dtype.
  """
  rows = partition.by_row(None, axis)
  return partition.over_mesh(
      functools.partial(_convolve, interpret),
      lambda width: (
          rows, partition.split(None, axis), partition.split(axis),
          partition.unless_none(document_BT, partition.by_row()),
          partition.unless_none(tail_BWE, rows),
      ),
      rows, x_BTE, kernel_WE, bias_E, document_BT, tail_BWE,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(interpret: bool, *inputs: PyTree) -> Array:
  del interpret
  return convolve(*inputs, delays=delays_by_padding)


def _forward(interpret: bool, *inputs: PyTree) -> tuple[Array, tuple[PyTree, ...]]:
  return _convolve(interpret, *inputs), inputs


def _backward(interpret: bool, inputs: tuple[PyTree, ...], d_y_BTE: Array) -> tuple[PyTree, ...]:
  x_BTE, kernel_WE, bias_E, document_BT, tail_BWE = inputs
  time, width = x_BTE.shape[1:]
  taps = kernel_WE.shape[0]
  part = min(_PART, round_up(time, _TILE))
  # The largest power of two that divides the width.
  sizes = _Sizes(taps, min(_BLOCK, width & -width), part, round_up(time, part))
  d_x_BTE, sums_BGAE = _call(
      sizes, interpret, pad_time(x_BTE, part), kernel_WE, bias_E,
      None if document_BT is None else pad_time(document_BT, part), tail_BWE,
      pad_time(d_y_BTE, part),
  )
  sums_AE = jnp.sum(sums_BGAE, axis=(0, 1))
  d_tail_BWE = None
  if tail_BWE is not None:  # It reaches the first W - 1 tokens.
    first = slice(None), slice(taps - 1)

    def of_tail(tail_BWE: Array) -> Array:
      document = None if document_BT is None else document_BT[first]
      return convolve(
          x_BTE[first], kernel_WE, bias_E, document, tail_BWE, delays=delays_by_padding
      )

    (d_tail_BWE,) = jax.vjp(of_tail, tail_BWE)[1](d_y_BTE[first])
  d_kernel_WE = sums_AE[:taps].astype(kernel_WE.dtype)
  return d_x_BTE[:, :time], d_kernel_WE, sums_AE[taps].astype(bias_E.dtype), None, d_tail_BWE


_convolve.defvjp(_forward, _backward)


def _call(
    sizes: _Sizes, interpret: bool, x_BTE: Array, kernel_WE: Array, bias_E: Array,
    document_BT: Array | None, tail_BWE: Array | None, d_y_BTE: Array,
) -> tuple[Array, Array]:
  """Returns the gradient of x, and for each part of a row those of the taps and of the bias."""
  batch, time, width = x_BTE.shape
  parts, block = time // sizes.part, sizes.block
  rows = pl.BlockSpec((None, time, block), lambda b, e, g: (b, 0, e))
  sums = jax.ShapeDtypeStruct((batch, parts, sizes.taps + 1, width), jnp.float32)
  cost = KernelCost(
      matmul_flops=0, flops=x_BTE.size * sizes.taps * (4 * sizes.taps + 8),
      transcendentals=x_BTE.size * sizes.taps,
      bytes_accessed=(2 * x_BTE.nbytes + d_y_BTE.nbytes + sums.size * 4),
  )
  with cost.scope():
    return pl.pallas_call(
        functools.partial(_kernel, sizes),
        grid=(batch, width // block, parts),
        in_specs=[
            rows, pl.BlockSpec((sizes.taps, block), lambda b, e, g: (0, e)),
            pl.BlockSpec((block,), lambda b, e, g: (e,)),
            partition.unless_none(document_BT, pl.BlockSpec((None, time), lambda b, e, g: (b, 0))),
            partition.unless_none(
                tail_BWE,
                pl.BlockSpec((None, sizes.taps - 1, block), lambda b, e, g: (b, 0, e)),
            ),
            rows,
        ],
        out_specs=[
            rows,
            pl.BlockSpec(
                (None, None, sizes.taps + 1, block), lambda b, e, g: (b, g, 0, e)
            ),
        ],
        out_shape=[jax.ShapeDtypeStruct(x_BTE.shape, x_BTE.dtype), sums],
        interpret=interpret, cost_estimate=cost.estimate(),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
    )(x_BTE, kernel_WE, bias_E, document_BT, tail_BWE, d_y_BTE)


def _kernel(
    sizes: _Sizes, x_TE: PyTree, kernel_WE: PyTree, bias_E: PyTree, document_T: PyTree,
    tail_WE: PyTree, d_y_TE: PyTree, d_x_TE: PyTree, sums_AE: PyTree,
) -> None:
  """Computes the gradients of one part of a row; the arguments are references to its blocks."""
  taps = sizes.taps
  tap_E = [kernel_WE[taps - 1 - back, :].astype(jnp.float32) for back in range(taps)]
  bias_1E = bias_E[:].astype(jnp.float32)[None]
  begin = pl.program_id(2) * sizes.part

  def step(tile: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
    first = begin + tile * _TILE
    x, document, inside = {}, {}, {}
    # Inputs from W - 1 tokens before to W - 1 after, by their distance.
    for away in range(1 - taps, taps):
      at_T = first + away + jnp.arange(_TILE)
      row_T = jnp.clip(at_T, 0, sizes.time - 1)
      inside[away] = (at_T >= 0) & (at_T < sizes.time)
      x_tile = x_TE[row_T, :].astype(jnp.float32)
      if tail_WE is not None and away < 0:
        tail = tail_WE[jnp.clip(at_T + taps - 1, 0, taps - 2), :].astype(jnp.float32)
        x[away] = jnp.where((at_T < 0)[:, None], tail, x_tile)
      else:
        x[away] = jnp.where(inside[away][:, None], x_tile, 0.0)
      if document_T is not None:  # The tail belongs to document 0.
        document[away] = jnp.where(at_T < 0, 0, document_T[row_T])

    def of_document(value: Array, away: int, at: int) -> Array:
      """Clears tokens `away` that belong to another document than those `at`."""
      if document_T is None or away == at:
        return value
      return jnp.where((document[away] == document[at])[:, None], value, 0.0)

    d_x = jnp.zeros((_TILE, sizes.block), jnp.float32)
    for ahead in reversed(range(taps)):
      c = jnp.broadcast_to(bias_1E, d_x.shape)
      for back in range(taps):
        c += of_document(x[ahead - back], ahead - back, ahead) * tap_E[back][None]
      row_T = jnp.minimum(first + ahead + jnp.arange(_TILE), sizes.time - 1)
      d_y = jnp.where(inside[ahead][:, None], d_y_TE[row_T, :].astype(jnp.float32), 0.0)
      active = sigmoid(c)
      d_c = d_y * active * (1 + c * (1 - active))
      d_x += of_document(d_c, ahead, 0) * tap_E[ahead][None]
    # The last one is that of the tokens themselves.
    products = [d_c * of_document(x[-back], -back, 0) for back in reversed(range(taps))]
    d_x_TE[pl.ds(first, _TILE), :] = d_x.astype(d_x_TE.dtype)
    return tuple(total + term for total, term in zip(sums, [*products, d_c], strict=True))

  zero = jnp.zeros((_TILE, sizes.block), jnp.float32)
  sums = jax.lax.fori_loop(0, sizes.part // _TILE, step, (zero,) * (taps + 1))
  for row, total in enumerate(sums):
    sums_AE[row, :] = jnp.sum(total, axis=0)
