"""The stack: a scan over super-blocks equals layers apart, with and without remat."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dense_jax.errors import InputError
from dense_jax.layers.stack import (
  LOW_RANK,
  LayerPlan,
  StackState,
  plan_layers,
  wide_products,
)
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
from tests.helpers import assert_trees_close, scale_of

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
def test_the_plan_of_layers(layers, depth, block_layers, expected):
  config = model_config("gau_retnet", depth, layers=layers, block_layers=block_layers)
  plan = plan_layers(config)
  block = plan.pattern * plan.repeats
  assert (plan.prefix, block, plan.super_blocks) == expected
  assert plan.prefix + block * plan.super_blocks == layers
  assert plan.prefix >= min(depth, layers)  # Layers with fewer sources have other parameters.
  scanned = [layer for position in range(plan.pattern) for layer in plan.layers(position)]
  assert sorted(scanned) == list(range(plan.prefix, layers))


@pytest.mark.parametrize(("reads", "depth", "layers", "read"), [
    ("nearest", 3, 6, [(), (0,), (1, 0), (2, 1, 0), (3, 2, 1), (4, 3, 2)]),
    ("first", 2, 5, [(), (0,), (0, 1), (0, 1), (0, 1)]),
    ("spread", 3, 7, [(), (0,), (1, 0), (2, 1), (3, 2, 0), (4, 3, 1), (5, 4, 2)]),
])
def test_which_layers_are_read(reads, depth, layers, read):
  config = model_config("gau_retnet", depth, layers=layers, reads=reads)
  assert [config.dense.layers_read(layer) for layer in range(layers)] == read
  plan = plan_layers(config)
  assert len({len(read[layer]) for layer in range(plan.prefix, layers)}) <= 1
  deeper = model_config("gau_retnet", depth + 1, layers=20, reads=reads)
  for layer, fewer in enumerate(read):
    assert deeper.dense.layers_read(layer)[: len(fewer)] == fewer


@pytest.mark.parametrize(("change", "message"), [
    ({"depth": 4, "reads": "spread"}, "dense.depth = 4 is not valid: expected with reads=spread an "
     r"integer from 0 to 3: the farthest layer is 2 \*\* \(depth - 1\) below, of 8"),
    ({"depth": 3, "reads": "spread", "block_layers": 3}, "block_layers = 3 .* that is >= 4"),
    ({"depth": 1, "reads": "first", "source": "fused"}, "dense.reads = 'first'"),
])
def test_reads_that_are_not_valid(change, message):
  with pytest.raises(InputError, match=message):
    model_config("gau_retnet", layers=8, **change)


def test_layers_of_a_pattern_that_repeats():
  config = model_config("gau_retnet", 1, layers=9, start=2, stride=2, block_layers=2)
  plan = plan_layers(config)
  assert plan == LayerPlan(prefix=3, pattern=2, repeats=1, super_blocks=3)
  assert [list(plan.layers(position)) for position in (0, 1)] == [[3, 5, 7], [4, 6, 8]]


def _stacked(parts, plan):
  """Stacks a list of layers' states as the scanned stack has them."""
  scanned = tuple(
      jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parts[i] for i in plan.layers(position)))
      for position in range(plan.pattern)
  )
  return StackState(tuple(parts[: plan.prefix]), scanned)


def _apart(state, plan):
  """Inverts `_stacked`: returns a scanned stack's state as a list of layers' states."""
  parts = dict(enumerate(state.prefix_layers))
  for position, stacked in enumerate(state.scanned_layers):
    for row, layer in enumerate(plan.layers(position)):
      parts[layer] = jax.tree.map(lambda leaf, r=row: leaf[r], stacked)
  return [parts[layer] for layer in sorted(parts)]


@pytest.mark.parametrize(("family", "inject", "depth", "options"), [
    pytest.param("gau_retnet", "state", 0, {"layers": 5, "block_layers": 2},
                 marks=pytest.mark.exhaustive),
    pytest.param("mamba", "state", 1, {"layers": 4}, marks=pytest.mark.exhaustive),
    pytest.param("gau_retnet", "state", 2, {"layers": 7}, marks=pytest.mark.exhaustive),
    pytest.param("gau_retnet", "inputs", 1, {"layers": 6, "block_layers": 2},
                 marks=pytest.mark.exhaustive),
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
    # A bank that does not change, and one of which every layer reads a part.
    *[pytest.param("gau_retnet", inject, depth, {"layers": 12, "reads": reads, "remat": remat,
                                                 "block_layers": block}, marks=marks)
      for inject, depth, reads, remat, block, marks in (
          ("inputs", 1, "first", "minimal", 5, pytest.mark.exhaustive),
          ("state", 3, "spread", "full", 0, pytest.mark.exhaustive),
          ("state", 2, "first", "full", 3, pytest.mark.slow),
          ("state", 2, "first", "reads", 0, pytest.mark.exhaustive),
          ("inputs", 2, "spread", "minimal", 2, pytest.mark.slow))],
    pytest.param("transformer", "state", 0, {"layers": 4, "remat": "reads"},
                 marks=pytest.mark.exhaustive),
])
def test_scanned_equals_unrolled(family, inject, depth, options):
  config = model_config(family, depth, inject, **options)
  plan = plan_layers(config)
  assert plan.super_blocks >= 2
  model, abstract = random_model(config), abstract_model(config)
  state = random_state(model, [2, 0])
  apart = _apart(state.layers, plan)
  tokens, weights = random_tokens(0, B, T), normal(1, B, T, VOCAB, scale=0.1)
  weights = weights * SEGMENTS.valid_BT[..., None]
  cotangent = random_like(apart, 3)

  def run(params, layer_states, scanned):
    bound = with_params(abstract, params)
    if scanned:
      start = _stacked(layer_states, plan)
    else:
      bound, start = unrolled(bound), StackState(tuple(layer_states), ())
    hidden, after = bound.hidden(tokens, SEGMENTS, ModelState(state.position_B, start))
    after = _apart(after.layers, plan if scanned else LayerPlan(config.layers))
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
    plan = plan_layers(model.config)
    flat = ModelState(state.position_B, StackState(tuple(_apart(state.layers, plan)), ()))
    after, logits = model.step(state, tokens)
    flat_after, flat_logits = unrolled(model).step(flat, tokens)
    flat_layers = list(flat_after.layers.prefix_layers)
    return (_apart(after.layers, plan), logits), (flat_layers, flat_logits)

  scanned, one_by_one = both(model, state)
  assert_trees_close(scanned, one_by_one)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "inject"), [("mamba", "state"), ("gau_retnet", "inputs")])
def test_remat_changes_nothing(family, inject):
  config = model_config(family, 1, inject, layers=4)
  assert plan_layers(config) == LayerPlan(prefix=1, pattern=1, repeats=1, super_blocks=3)
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
  gradients, outputs = gradient("none")(*args)
  for remat in ("minimal", "reads", "full"):
    actual_gradients, actual_outputs = gradient(remat)(*args)
    assert_trees_close(actual_gradients, gradients, scale=scale_of(gradients))
    assert_trees_close(actual_outputs, outputs)


@pytest.mark.slow
def test_remat_saves_memory():
  """The compiler reports the memory that the backward pass holds."""
  base = abstract_model(model_config("gau_retnet", 1, layers=9, width=32, chunk=16))
  params, tokens = get_params(base), jax.ShapeDtypeStruct((2, 64), jnp.int32)

  def temporary(remat):
    model = with_options(base, remat=remat)
    gradient = jax.grad(lambda params, tokens: jnp.sum(with_params(model, params)(tokens)))
    compiled = fast_jit(gradient).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary("full") < 0.6 * temporary("none")


@pytest.mark.parametrize("rank", [LOW_RANK, LOW_RANK + 1])
def test_low_rank_products_are_computed_again(rank):
  x, kernel = jnp.ones((3, rank)), jnp.ones((rank, 5))

  def loss(kernel):
    return jnp.sum(jnp.sin(jnp.sin(x @ kernel)))

  def products(loss):
    return str(jax.make_jaxpr(jax.grad(loss))(kernel)).count("dot_general[")

  again = products(jax.checkpoint(loss, policy=wide_products)) - products(loss)
  assert again == (rank <= LOW_RANK)


def test_fewer_layers_than_a_block_have_no_scan():
  model = random_model(model_config("mamba", 1, layers=3, block_layers=3))
  text = str(jax.make_jaxpr(model.step)(model.init_state(B), random_tokens(0, B)))
  assert "scan[" not in text
  assert model.init_state(B).layers.scanned_layers == ()
  assert len(model.init_state(B).layers.prefix_layers) == 3
