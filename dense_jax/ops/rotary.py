"""Rotations by position times angle (arXiv 2104.09864) that are as good at every position.

A float32 product of a position and an angle is rounded to its own size: a token a million
tokens into a document would be turned by a phase that is wrong by 0.03 radians. Only what is
left of whole turns matters, so that phases are counted in whole units of 2^-32 turns: integer
arithmetic drops whole turns by itself, and rounds nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.types import Array


def rotation(position: Array, angles_M: np.ndarray) -> tuple[Array, Array]:
  """The cosine and sine of position * angle.

  Args:
    position: integers [...], 0 <= position < 2^31.
    angles_M: float64 radians a token, >= 0; a constant.

  Returns:
    Two float32 arrays [..., M]. Phases are right to 3e-7 radians, and what the rounding of
    float64 angles makes at large positions (1e-7 at 2^30).
  """
  phase = jax.lax.bitcast_convert_type(_phase(position, angles_M), jnp.int32)
  # From half a turn back to half a turn ahead.
  radians = phase.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
  return jnp.cos(radians), jnp.sin(radians)


def _phase(position: Array, angles_M: np.ndarray) -> Array:
  """position * angle less whole turns, uint32 [..., M] in units of 2^-32 turns."""
  # Fractions of a turn as 64 bits: the unit's, then two digits of 16 bits below it.
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
  # Products of 16 bits have 32. That of both low digits is less than a unit.
  carried = high * first + (low * first >> 16) + (high * second >> 16)
  return position * whole + carried
