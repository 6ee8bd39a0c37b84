"""Tests of the norm of each head and its gate against JAX's own gradients."""

import jax
import jax.numpy as jnp
import pytest

from dense_jax.ops.gated_norm import gated_norm
from dense_jax.ops.heads import broadcast_heads, repeat_heads
from tests.builders import normal
from tests.helpers import assert_trees_close

B, T, H, P = 2, 5, 3, 4


@pytest.mark.parametrize("repeat", [broadcast_heads, repeat_heads])
@pytest.mark.parametrize("added", [True, False])
def test_it_and_its_gradients_are_those_of_the_formula(added, repeat):
  inputs = {
      "y": normal(0, B, T, H * P), "gate": normal(1, B, T, H * P), "factor": normal(2, B, T, H),
      "added": normal(3, B, T, H) if added else None,
  }
  cotangent = normal(4, B, T, H * P)

  def run(y, gate, factor, added):
    return gated_norm(y, gate, factor, added, repeat)

  def formula(y, gate, factor, added):
    normed = y * jnp.repeat(factor, P, axis=-1)
    if added is not None:
      normed = normed + jnp.repeat(added, P, axis=-1)
    return normed * jax.nn.silu(gate)

  def everything(function):
    result, pullback = jax.vjp(function, *inputs.values())
    return result, pullback(cotangent)

  assert_trees_close(everything(run), everything(formula))


def test_it_rounds_once_to_the_gates_dtype():
  low = [normal(seed, B, T, H * P).astype(jnp.bfloat16) for seed in (0, 1)]
  factor = normal(2, B, T, H)
  exact = gated_norm(*(x.astype(jnp.float32) for x in low), factor, None, broadcast_heads)
  result = gated_norm(*low, factor, None, broadcast_heads)
  assert result.dtype == jnp.bfloat16
  assert jnp.array_equal(result, exact.astype(jnp.bfloat16))
