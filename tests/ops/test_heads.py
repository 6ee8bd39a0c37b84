"""Tests of numbers of heads that are repeated for their channels."""

import jax
import jax.numpy as jnp
import pytest

from dense_jax.ops.heads import broadcast_heads, repeat_heads
from tests.builders import normal
from tests.helpers import assert_trees_close


@pytest.mark.parametrize("repeat", [broadcast_heads, repeat_heads])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_each_head_is_repeated_and_its_gradient_is_a_sum(heads, repeat):
  x, cotangent = normal(0, 2, 3, heads), normal(1, 2, 3, heads * 4)
  actual, pullback = jax.vjp(lambda x: repeat(x, 4), x)
  expected, expected_pullback = jax.vjp(lambda x: jnp.repeat(x, 4, axis=-1), x)
  assert_trees_close((actual, pullback(cotangent)), (expected, expected_pullback(cotangent)))
