"""Rotary positions (arXiv 2104.09864) that are equally accurate at every position.

A float32 product of a position and an angle has a rounding error that grows with the product: a
token a million tokens into a document would be rotated by a phase that is wrong by 0.03 radians.
Only the phase modulo one turn matters. So phases are counted in units of 2^-32 turns as uint32,
where overflow drops whole turns and nothing is rounded.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.types import Array


def rotation(position: Array, angles_M: np.ndarray) -> tuple[Array, Array]:
  """Computes the cosine and sine of position * angle.

  Args:
    position: integers [...], 0 <= position < 2^31.
    angles_M: float64 radians a token, >= 0; a constant.

  Returns:
    Two float32 arrays [..., M]. Phases are accurate to 3e-7 radians, plus the effect of rounding
    the angles to float64 (1e-7 at position 2^30).
  """
  phase = jax.lax.bitcast_convert_type(_phase(position, angles_M), jnp.int32)
  # As int32, phases lie in [-1/2, 1/2) turns.
  radians = phase.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
  return jnp.cos(radians), jnp.sin(radians)


def _phase(position: Array, angles_M: np.ndarray) -> Array:
  """Returns position * angle modulo one turn, uint32 [..., M] in units of 2^-32 turns."""
  # Fractions of a turn as 64 bits: 32 bits of whole units, then two digits of 16 bits below.
  turns_M = np.asarray(angles_M, np.float64) / (2 * np.pi) % 1.0
  bits_M = np.asarray([int(turns * 2**64) for turns in turns_M], np.uint64)
  whole_M, first_M, second_M = (
      jnp.asarray(bits_M >> np.uint64(shift) & np.uint64(mask), jnp.uint32)
      for shift, mask in ((32, 2**32 - 1), (16, 2**16 - 1), (0, 2**16 - 1))
  )
  position = position.astype(jnp.uint32)[..., None]
  high, low = position >> 16, position & 0xFFFF
  spread = (1,) * (position.ndim - 1) + (-1,)
  whole, first, second = (digit_M.reshape(spread) for digit_M in (whole_M, first_M, second_M))
  # Products of 16-bit digits fit 32 bits. low * second is less than one unit and left out.
  carried = high * first + (low * first >> 16) + (high * second >> 16)
  return position * whole + carried


def rotate_neighbours(x_HN: Array, position: Array) -> Array:
  """Rotates neighbouring pairs of the last axis by position * angle (retention).

  Args:
    x_HN: [..., H, N].
    position: int32 >= 0 [...]; its leading axis may be 1.

  Returns:
    An array of x's shape and dtype; products are float32. Angles fall from 1 to 1e-4 radians a
    token over the N / 2 pairs.
  """
  half = x_HN.shape[-1] // 2
  cos, sin = rotation(position[..., None], 10000.0 ** -np.linspace(0.0, 1.0, half))
  pairs = x_HN.astype(jnp.float32).reshape(*x_HN.shape[:-1], half, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return turned.reshape(x_HN.shape).astype(x_HN.dtype)


def rotate_halves(x_HN: Array, position: Array, theta: float) -> Array:
  """Rotates feature i of the first half with feature i of the second (attention, LLaMA).

  Args:
    x_HN: [..., heads, N].
    position: int32 >= 0 [...]; its leading axis may be 1.
    theta: angle i is theta^(-2 i / N) radians a token.

  Returns:
    An array of x's shape and dtype; products are float32.
  """
  half = x_HN.shape[-1] // 2
  cos, sin = rotation(position[..., None], theta ** (-np.arange(half) / half))
  first, second = jnp.split(x_HN.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x_HN.dtype)
