"""The stack: a scan over super-blocks equals layers apart, with and without remat."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dense_jax.layers.stack import block_sizes, pattern_length
from dense_jax.models.language_model import ModelState
from dense_jax.models.params import abstract_model, get_params, unrolled, with_params
from tests.builders import (
    VOCAB,
    fast_jit,
    model_config,
    normal,
    packed,
    random_like,
    random_model,
    random_state,
    random_tokens,
    tree_dot,
    with_options,
)
from tests.helpers import assert_trees_close

B, T = 2, 7
SEGMENTS = packed([[3, 4], [5]], time=T, first=[2, 0])


@pytest.mark.parametrize(("layers", "depth", "block_layers", "expected"), [
    (1, 0, 0, (1, 0, 0)),
    (2, 0, 0, (0, 1, 2)),
    (5, 0, 2, (1, 2, 2)),
    (2, 1, 0, (2, 0, 0)),  # One super-block would only hide the layers.
    (3, 1, 0, (1, 1, 2)),
    (7, 1, 3, (1, 3, 2)),
    (8, 1, 3, (2, 3, 2)),
    (6, 2, 0, (2, 2, 2)),
    (7, 2, 0, (3, 2, 2)),  # The remainder goes to the head.
    (5, 2, 5, (5, 0, 0)),
    (48, 4, 4, (4, 4, 11)),
])
def test_block_sizes(layers, depth, block_layers, expected):
  config = model_config("gau_retnet", depth, layers=layers, block_layers=block_layers)
  head, block, blocks = block_sizes(config)
  assert (head, block, blocks) == expected
  assert head + block * blocks == layers
  assert head >= min(depth, layers)  # Layers with fewer sources have other parameters.


def _stacked(parts, head, pattern):
  """A list of layers' states as the scanned stack has them."""
  blocks = [
      jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts[head + index :: pattern])
      for index in range(pattern)
  ]
  return {"head": parts[:head], "blocks": blocks}


def _apart(state, layers):
  """The inverse: a scanned stack's state as a list of layers' states."""
  parts, pattern = list(state["head"]), len(state["blocks"])
  for index in range(layers - len(parts)):
    repeat, of_pattern = divmod(index, pattern)
    parts.append(jax.tree.map(lambda leaf, r=repeat: leaf[r], state["blocks"][of_pattern]))
  return parts


@pytest.mark.parametrize(("family", "inject", "depth", "options"), [
    pytest.param("gau_retnet", "state", 0, {"layers": 5, "block_layers": 2},
                 marks=pytest.mark.exhaustive),
    pytest.param("mamba", "state", 1, {"layers": 4}, marks=pytest.mark.exhaustive),
    pytest.param("gau_retnet", "state", 2, {"layers": 7}, marks=pytest.mark.slow),
    ("gau_retnet", "inputs", 1, {"layers": 6, "block_layers": 2}),
    # Two levels: three super-blocks, more layers in the bank than one layer renews.
    pytest.param("gau_retnet", "state", 2, {"layers": 8, "block_layers": 2, "remat": "full"},
                 marks=pytest.mark.slow),
    pytest.param("gau_retnet", "inputs", 2, {"layers": 7, "remat": "reads"},
                 marks=pytest.mark.exhaustive),
    # A pattern of two layers, more than the bank holds; and a bank of more than a pattern.
    pytest.param("gau_retnet", "state", 1,
                 {"layers": 9, "stride": 2, "block_layers": 4, "remat": "full"},
                 marks=pytest.mark.slow),
    pytest.param("mamba", "state", 3,
                 {"layers": 11, "stride": 2, "block_layers": 4, "remat": "full"},
                 marks=pytest.mark.exhaustive),
    pytest.param("transformer", "state", 0, {"layers": 4, "remat": "reads"},
                 marks=pytest.mark.exhaustive),
])
def test_scanned_equals_unrolled(family, inject, depth, options):
  config = model_config(family, depth, inject, **options)
  layers = config.layers
  head, _, blocks = block_sizes(config)
  assert blocks >= 2
  model, abstract = random_model(config), abstract_model(config)
  state = random_state(model, [2, 0])
  apart = _apart(state.layers, layers)
  tokens, weights = random_tokens(0, B, T), normal(1, B, T, VOCAB, scale=0.1)
  weights = weights * SEGMENTS.valid_BT[..., None]
  cotangent = random_like(apart, 3)

  def run(params, layer_states, scanned):
    bound = with_params(abstract, params)
    if scanned:
      start = _stacked(layer_states, head, pattern_length(config))
    else:
      bound, start = unrolled(bound), {"head": layer_states, "blocks": []}
    hidden, after = bound.hidden(tokens, SEGMENTS, ModelState(state.position_B, start))
    after = _apart(after.layers, layers) if scanned else after.layers["head"]
    logits = bound.logits(hidden) * SEGMENTS.valid_BT[..., None]
    objective = jnp.sum(logits * weights) + 0.01 * tree_dot(after, cotangent)
    return objective, (logits, after)

  @fast_jit
  def both(params, layer_states):
    return [
        jax.grad(functools.partial(run, scanned=scanned), argnums=(0, 1), has_aux=True)(
            params, layer_states
        ) for scanned in (True, False)
    ]

  scanned, one_by_one = both(get_params(model), apart)
  assert_trees_close(scanned, one_by_one)


@pytest.mark.parametrize(("family", "inject", "layers", "depth"), [
    ("mamba", "state", 7, 2), ("gau_retnet", "inputs", 4, 1),
])
def test_a_decoding_step_of_the_scan_equals_the_unrolled_one(family, inject, layers, depth):
  model = random_model(model_config(family, depth, inject, layers=layers))
  state, tokens = random_state(model, [2, 9]), random_tokens(0, B)

  @fast_jit
  def both(model, state):
    flat = ModelState(state.position_B, {"head": _apart(state.layers, layers), "blocks": []})
    after, logits = model.step(state, tokens)
    flat_after, flat_logits = unrolled(model).step(flat, tokens)
    return (_apart(after.layers, layers), logits), (flat_after.layers["head"], flat_logits)

  scanned, one_by_one = both(model, state)
  assert_trees_close(scanned, one_by_one)


@pytest.mark.parametrize(("family", "inject"), [
    pytest.param("mamba", "state", marks=pytest.mark.slow), ("gau_retnet", "inputs")
])
def test_remat_changes_nothing(family, inject):
  config = model_config(family, 1, inject, layers=4)
  assert block_sizes(config) == (1, 1, 3)
  model = random_model(config)
  tokens, weights = random_tokens(0, B, T), normal(1, B, T, VOCAB, scale=0.1)
  state = random_state(model, [2, 0])
  weights = weights * SEGMENTS.valid_BT[..., None]

  def gradient(remat):
    other = with_options(model, remat=remat)

    def objective(params, layers):
      bound = with_params(other, params)
      hidden, after = bound.hidden(tokens, SEGMENTS, ModelState(state.position_B, layers))
      logits = bound.logits(hidden) * SEGMENTS.valid_BT[..., None]
      return jnp.sum(logits * weights), (logits, after)

    return fast_jit(jax.grad(objective, argnums=(0, 1), has_aux=True))

  args = get_params(model), state.layers
  expected = gradient("none")(*args)
  for remat in ("minimal", "reads", "full"):
    assert_trees_close(gradient(remat)(*args), expected)


def test_remat_saves_memory():
  """What the backward pass holds, by the compiler."""
  base = abstract_model(model_config("gau_retnet", 1, layers=9, width=32, chunk=16))
  params, tokens = get_params(base), jax.ShapeDtypeStruct((2, 64), jnp.int32)

  def temporary(remat):
    model = with_options(base, remat=remat)
    gradient = jax.grad(lambda params, tokens: jnp.sum(with_params(model, params)(tokens)))
    compiled = fast_jit(gradient).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary("full") < 0.6 * temporary("none")


def test_fewer_layers_than_a_block_have_no_scan():
  model = random_model(model_config("mamba", 1, layers=3, block_layers=3))
  text = str(jax.make_jaxpr(model.step)(model.init_state(B), random_tokens(0, B)))
  assert "scan[" not in text
  assert model.init_state(B).layers["blocks"] == []
  assert len(model.init_state(B).layers["head"]) == 3
