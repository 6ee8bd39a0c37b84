"""Cutting the time axis into chunks."""

import jax.numpy as jnp

from dense_jax.types import Array


def chunk_length(chunk: int, default: int, time: int) -> int:
  """Returns the tokens per chunk: `chunk`, or `default` if it is 0; at most `time`."""
  return min(chunk or default, time)


def round_up(size: int, multiple: int) -> int:
  """Returns the least multiple that is at least `size`."""
  return -(-size // multiple) * multiple


def pad_time(x_BT: Array, chunk: int) -> Array:
  """Pads axis 1 at its end with zeros (false) up to a multiple of `chunk`."""
  extra = -x_BT.shape[1] % chunk
  if not extra:
    return x_BT
  return jnp.pad(x_BT, ((0, 0), (0, extra)) + ((0, 0),) * (x_BT.ndim - 2))


def chunk_ends(time: int, chunk: int) -> Array:
  """Returns a bool mask [G, C], true at the last token of each chunk that is not padding."""
  token_GC = jnp.arange(round_up(time, chunk)).reshape(-1, chunk)
  return (token_GC % chunk == chunk - 1) | (token_GC == time - 1)


def split_time(x_BT: Array, chunk: int) -> Array:
  """Splits [B, T, ...] into [B, G, C, ...], padded with zeros if C does not divide T."""
  x_BT = pad_time(x_BT, chunk)
  return x_BT.reshape(x_BT.shape[0], -1, chunk, *x_BT.shape[2:])
