"""Tests of rotary positions against exact integer arithmetic, at small and large positions."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops.rotary import rotate_halves, rotate_neighbours, rotation
from tests.builders import fast_jit, normal

PI = Fraction(3141592653589793238462643383279502884197, 10**39)
M = 16
RETENTION = 10000.0 ** -np.linspace(0.0, 1.0, M)
ANGLES = {
    "retention": RETENTION, "attention": 500000.0 ** (-np.arange(M) / M),
    "more than a turn": np.linspace(0.0, 20.0, M),
}
# In radians: float32 holds half a turn to 1.2e-7; scaling and the cosine add to that.
ERROR = 5e-7


def _positions(end):
  """Returns the last positions below `end`, and some before them."""
  rng = np.random.default_rng(0)
  return np.concatenate([np.arange(end - 9, end), rng.integers(0, end, 50)]).astype(np.int32)


def _phases(positions, angles):
  """Returns position * angle modulo one turn, float64 [T, M], from exact products."""
  turns = [Fraction(angle) / (2 * PI) for angle in angles]
  return np.asarray([
      [2 * np.pi * float(turn * int(position) % 1) for turn in turns] for position in positions
  ])


@pytest.mark.parametrize("end", [9, 2048, 65536, 2**20, 2**24 + 2, 2**30, 2**31])
@pytest.mark.parametrize("name", ANGLES)
def test_cosine_and_sine_are_exact_at_every_position(name, end):
  positions = _positions(end)
  cos, sin = fast_jit(lambda position: rotation(position, ANGLES[name]))(positions)
  assert cos.dtype == sin.dtype == jnp.float32
  phases = _phases(positions, ANGLES[name])
  # Angles are rounded to float64, and positions multiply that error.
  error = ERROR + end * 2.0**-53 * ANGLES[name].max()
  assert np.max(np.abs(cos - np.cos(phases))) < error
  assert np.max(np.abs(sin - np.sin(phases))) < error


def _retention_turned(x, cos, sin):
  even, odd = x[..., 0::2], x[..., 1::2]
  return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def _attention_turned(x, cos, sin):
  first, second = np.split(x, 2, axis=-1)
  return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.parametrize("end", [2048, 2**20, 2**30])
@pytest.mark.parametrize(("rotate", "turned", "angles"), [
    (rotate_neighbours, _retention_turned, RETENTION),
    (lambda x, position: rotate_halves(x, position, 500000.0), _attention_turned,
     ANGLES["attention"]),
], ids=["retention", "attention"])
def test_layers_rotate_as_well_far_into_a_document(rotate, turned, angles, end):
  positions = _positions(end)
  keys = np.maximum(positions - 100, 0).astype(np.int32)
  q, k = (normal(seed, len(positions), 3, 2 * M) for seed in range(2))
  actual = [fast_jit(rotate)(x, position) for x, position in ((q, positions), (k, keys))]
  expected = []
  for x, position in ((q, positions), (k, keys)):
    phases = _phases(position, angles)[:, None]
    expected.append(turned(np.asarray(x, np.float64), np.cos(phases), np.sin(phases)))
  for left, right in zip(actual, expected, strict=True):
    assert left.dtype == jnp.float32
    assert np.max(np.abs(left - right)) < 4 * ERROR
  scores = [np.einsum("thn,thn->th", *np.asarray(pair, np.float64)) for pair in (actual, expected)]
  assert np.max(np.abs(scores[0] - scores[1])) < 1e-6 * np.std(scores[1])


def test_a_row_of_positions_may_be_shared():
  x, positions = normal(0, 2, 5, 3, 2 * M), jnp.arange(5)[None] + 2**24 + 1
  actual = fast_jit(rotate_neighbours)(x, positions)
  np.testing.assert_array_equal(actual, fast_jit(rotate_neighbours)(x, jnp.tile(positions, (2, 1))))
  # Beyond 2^24 float32 has no odd numbers, yet neighbours must differ as at the start.
  start = fast_jit(rotate_neighbours)(x, jnp.arange(5)[None])
  inner = [np.einsum("bshn,bthn->bhst", rotated, rotated) for rotated in (actual, start)]
  np.testing.assert_allclose(inner[0], inner[1], atol=1e-5)
