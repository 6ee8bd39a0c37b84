"""Diagonal states on XLA's CPU backend: workarounds for one row, and for a few tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import chunk_length
from dense_jax.ops.diagonal.chunked import DEFAULT_CHUNK, token_by_token
from dense_jax.ops.diagonal.sequence import RecurrentDiagonal
from dense_jax.types import Array


def _halves(x: Array) -> Array:
  """Splits [1, T, E] into [2, T, E / 2], half of the channels in each row."""
  return jnp.moveaxis(x.reshape(x.shape[1], 2, -1), 1, 0)


def _joined(x: Array) -> Array:
  """Inverts `_halves`."""
  return jnp.moveaxis(x, 0, 1).reshape(1, x.shape[1], -1)


def _twice(x: Array) -> Array:
  return jnp.concatenate([x, x])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CpuRecurrentDiagonal(RecurrentDiagonal):
  """Runs token by token; one row runs as two of half the channels, one chunk as two halves.

  The result is the same, as channels are independent. XLA's CPU backend compiles the unrolled
  steps of a single row into code that is up to 11 times as slow (4096 tokens, E 256, N 16,
  forward and backward: 207 us a token against 19, two cores). A loop of one chunk it does not
  keep as a loop, and what it makes of it is 3 times as slow (a model of 12 layers, 16 rows of 16
  tokens, E 1024, N 16, forward: 1.9 ms a token against 0.6, one core).
  """

  def _scan(self, c_BTN: Array) -> tuple[Array, Array]:
    batch, time, width = self.x_BTE.shape
    if 1 < time <= chunk_length(self.chunk, DEFAULT_CHUNK, time):
      return dataclasses.replace(self, chunk=-(-time // 2))._scan(c_BTN)
    if batch > 1 or width % 2:
      return super()._scan(c_BTN)
    y, final = token_by_token(
        _halves(self.dt_BTE()), _halves(self.a_NE[None]), _halves(self.x_BTE),
        _twice(self.b_BTN), _twice(c_BTN),
        None if self.resets_BT is None else _twice(self.resets_BT),
        _halves(self.before_first()), chunk=self.chunk,
    )
    return _joined(y), _joined(final)
