"""States that are kept in bfloat16: rounded between calls, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.layers.mixer import cast_recurrences
from dense_jax.models.language_model import ModelState
from tests.builders import (
  fast_jit,
  model_config,
  packed,
  random_batch,
  random_model,
  random_tokens,
  with_kinds,
)

KINDS = [
    ("mamba", 2, "state"), ("gau_retnet", 0, "state"), ("mamba2", 2, "state"), ("s4", 2, "state"),
    ("s4d", 0, "state"), ("retnet", 2, "state"), ("transformer", 0, "state"),
]


def _models(kind):
  family, depth, inject = kind
  return [
      random_model(model_config(family, depth, inject, state_dtype=dtype))
      for dtype in ("float32", "bfloat16")
  ]


def _rounded(state):
  """Rounds the states of recurrences to bfloat16, in float32."""
  layers = cast_recurrences(state.layers, jnp.bfloat16)
  return ModelState(state.position_B, cast_recurrences(layers, jnp.float32))


def _assert_equal(actual, expected):
  for mine, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(
        np.asarray(mine, np.float32), np.asarray(other, np.float32)
    )


@pytest.mark.slow
@with_kinds(KINDS)
def test_states_are_rounded_between_calls_and_nowhere_else(kind):
  exact, kept = _models(kind)
  step, read = (fast_jit(lambda m, *args, n=name: getattr(m, n)(*args)) for name in (
      "step", "prefill"))
  tokens = random_tokens(1, 2, 9)
  state, logits = read(kept, tokens[:, :5], None, kept.init_state(2))
  by_hand, expected = read(exact, tokens[:, :5], None, exact.init_state(2))
  _assert_equal(logits, expected)
  for time in range(5, 9):
    by_hand = _rounded(by_hand)
    _assert_equal(state, by_hand)
    state, logits = step(kept, state, tokens[:, time])
    by_hand, expected = step(exact, by_hand, tokens[:, time])
    _assert_equal(logits, expected)
  kept_in = {str(leaf.dtype) for leaf in jax.tree.leaves(state.layers)}
  assert ("bfloat16" in kept_in) == (kind[0] != "transformer")


@pytest.mark.parametrize("kind", [KINDS[0]])
def test_training_is_unaffected(kind):
  batch = random_batch(packed([[4, 7], [2, 3, 6]]))
  losses = [
      fast_jit(lambda m: m.token_losses(batch, chunk=4))(model) for model in _models(kind)
  ]
  _assert_equal(*losses)
