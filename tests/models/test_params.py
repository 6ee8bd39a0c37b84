"""Parameters as a flat dict: round trips, logical axes, errors that name paths."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dense_jax import sharding
from dense_jax.config import MeshConfig
from dense_jax.layers.stack import plan_layers
from dense_jax.models.params import (
    abstract_model,
    as_scanned,
    by_layer,
    count_params,
    decoding_params,
    get_params,
    init_params,
    logical_axes,
    unrolled,
    with_params,
)
from tests.builders import (
    KINDS,
    STATE_FAMILIES,
    each_family,
    each_kind,
    each_state_family,
    fast_jit,
    kind_name,
    model_config,
    random_model,
    random_params,
    random_tokens,
)
from tests.helpers import assert_trees_close


def _config(kind, **options):
  """Returns a configuration with enough layers for a scan over super-blocks."""
  family, depth, inject = kind
  if depth == 2 and inject == "state":
    options["transition"] = "linear"
  return model_config(family, depth, inject, layers=7, **options)


@each_kind
def test_round_trip(kind):
  config = _config(kind)
  params = random_params(config)
  again = get_params(with_params(abstract_model(config), params))
  assert list(again) == list(params)
  assert all(again[name] is params[name] for name in params)


@each_kind
def test_logical_axes_cover_every_parameter(kind):
  model = abstract_model(_config(kind))
  axes, params = logical_axes(model), get_params(model)
  assert axes.keys() == params.keys()
  known = {"layers", "embed", "vocab", "heads", "inner", None}
  for name, names in axes.items():
    assert len(names) == params[name].ndim, name
    assert set(names) <= known, name
    assert (names[0] == "layers") == name.startswith("stack.scanned_layers."), name
  assert set(sharding.PARAMETERS) <= known


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[9]], ids=kind_name)
def test_a_mismatch_names_the_paths_of_both_sides(kind):
  config = _config(kind)
  params = random_params(config)
  del params["norm.scale"]
  params["stack.extra"] = jnp.zeros(1)
  with pytest.raises(ValueError, match=r"norm\.scale, stack\.extra"):
    with_params(abstract_model(config), params)


@each_kind
def test_unrolled_holds_the_same_numbers_layer_by_layer(kind):
  config = _config(kind)
  model = random_model(config)
  flat = unrolled(model)
  assert not any(name.startswith("stack.scanned_layers.") for name in get_params(flat))
  assert unrolled(flat) is flat
  assert count_params(get_params(flat)) == count_params(get_params(model))
  scanned, plan = get_params(model), model.stack.plan
  assert plan.super_blocks >= 2
  for row, layer in enumerate(plan.layers(0)):
    np.testing.assert_array_equal(
        get_params(flat)[f"stack.prefix_layers.{layer}.norm.scale"],
        scanned["stack.scanned_layers.0.norm.scale"][row],
    )


@each_family
def test_fresh_parameters(family):
  """They are reproducible, different for each layer and key, float32, with gates at zero."""
  depth = 1 if family in STATE_FAMILIES else 0
  config = model_config(family, depth, "state", layers=3, transition="linear")
  init = fast_jit(lambda key: init_params(config, key))
  first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
  assert_trees_close(first, again, scale=0.0)
  for name, value in first.items():
    assert value.dtype == jnp.float32
    kernel = name.endswith("kernel")
    gate = "_gates." in name and name.endswith("up.kernel")
    if gate:
      assert not np.any(value), name
    elif kernel or name in ("embedding", "head"):
      assert not np.array_equal(value, other[name]), name
      assert np.abs(np.mean(value)) < 0.5 * np.std(value) + 1e-3, name
    if kernel and name.startswith("stack.scanned_layers.") and not gate:
      assert not np.array_equal(value[0], value[1]), name
    if name.endswith("transition.linear"):
      np.testing.assert_array_equal(value, np.broadcast_to(np.eye(value.shape[-1]), value.shape))


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[4], KINDS[9]], ids=kind_name)
def test_the_tests_own_parameters_are_away_from_fresh_ones(kind):
  """Every term of every equation then matters in the other tests."""
  config = model_config(*kind)
  fresh = fast_jit(lambda key: init_params(config, key))(jax.random.key(0))
  for name, value in random_params(config).items():
    assert value.shape == fresh[name].shape
    assert np.mean(np.abs(value - fresh[name]) > 1e-3) > 0.8, name


@each_state_family
def test_a_model_is_a_pytree_that_jit_takes(family):
  model = random_model(model_config(family, 1))
  tokens = random_tokens(0, 2, 5)
  run = fast_jit(lambda model, tokens: model(tokens))
  bound = fast_jit(lambda params, tokens: with_params(model, params)(tokens))
  assert_trees_close(run(model, tokens), bound(get_params(model), tokens))


# Three ways to scan ten layers: two of a pattern of two, and none at all.
FORMS = [{"block_layers": 4}, {"block_layers": 2, "remat": "full"}, {"block_layers": 10}]


def _form(options):
  return model_config("gau_retnet", 1, layers=10, start=2, stride=2, **options)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_by_layer_names_each_layer_and_comes_back(options):
  config = _form(options)
  params = random_params(config)
  state = (optax.EmptyState(), optax.adam(1.0).init(params), {"other": jnp.zeros(3)})
  flat, flat_state = by_layer(config, params), by_layer(config, state)
  assert not any(name.startswith("stack.") for name in flat)
  layers = {name.split(".")[1] for name in flat if name.startswith("layers.")}
  assert layers == {str(layer) for layer in range(10)}
  # Layers 2, 4, 6 and 8 read the one below: they alone have a dense connection.
  dense = {name.split(".")[1] for name in flat if ".dense." in name}
  assert dense == {"2", "4", "6", "8"}
  assert flat_state[1][0].mu.keys() == flat_state[1][0].nu.keys() == flat.keys()
  plan = plan_layers(config)
  for position in range(plan.pattern):
    for row, layer in enumerate(plan.layers(position)):
      np.testing.assert_array_equal(
          flat[f"layers.{layer}.norm.scale"],
          params[f"stack.scanned_layers.{position}.norm.scale"][row],
      )
  for tree, expected in ((flat, params), (flat_state, state)):
    again = jax.jit(lambda tree: as_scanned(config, tree))(tree)
    assert_trees_close(again, expected, scale=0.0)


def test_every_form_has_the_same_entries_by_layer():
  expected = by_layer(_form(FORMS[2]), get_params(abstract_model(_form(FORMS[2]))))
  for options in FORMS:
    config = _form(options)
    shapes = get_params(abstract_model(config))
    flat = by_layer(config, shapes)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in flat.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()
    }
    again = as_scanned(config, flat)
    assert {name: leaf.shape for name, leaf in again.items()} == {
        name: leaf.shape for name, leaf in shapes.items()
    }


def test_shapes_keep_their_shardings_by_layer():
  config = _form(FORMS[0])
  model = abstract_model(config)
  shapes = get_params(model)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
  placed = sharding.param_shardings(
      logical_axes(model), {name: leaf.shape for name, leaf in shapes.items()}, mesh
  )
  shapes = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name])
      for name, leaf in shapes.items()
  }
  flat = by_layer(config, shapes)
  assert tuple(flat["layers.5.mixer.q_proj.kernel"].sharding.spec) == ("fsdp", "tensor")
  again = as_scanned(config, flat)
  assert again == shapes


@pytest.mark.slow
@each_family
def test_fresh_parameters_do_not_depend_on_how_layers_are_scanned(family):
  """A layer's numbers follow from the seed and its own number.

  The random bits are the same; a compiler may round what is made of them by a few units in the
  last place.
  """
  depth = 1 if family in STATE_FAMILIES else 0

  def fresh(block_layers):
    config = model_config(family, depth, layers=5, block_layers=block_layers)
    init = jax.jit(lambda key: by_layer(config, init_params(config, key)))
    return init(jax.random.key(3))

  apart = fresh(5)
  for block_layers in (1, 2):
    scanned = fresh(block_layers)
    assert scanned.keys() == apart.keys()
    for name, value in scanned.items():
      ulps = np.testing.assert_array_max_ulp(np.asarray(value), np.asarray(apart[name]), maxulp=4)
      assert np.mean(ulps) < 0.1, name
  kernels = [name for name in apart if name.endswith("_proj.kernel")]
  for name in kernels:
    other = re.sub(r"layers\.\d", "layers.0", name)
    assert name == other or not np.array_equal(apart[name], apart[other]), name


@pytest.mark.parametrize("kind", [
    ("mamba2", {"depth": 2, "inject": "state"}),
    pytest.param(("gau_retnet", {"depth": 1, "inject": "inputs"}), marks=pytest.mark.slow),
    *(pytest.param((family, {}), marks=pytest.mark.exhaustive)
      for family in ("mamba", "gau_retnet", "retnet", "s4d", "transformer")),
], ids=str)
def test_decoding_with_rounded_matrices_is_exactly_the_same(kind):
  family, dense = kind
  config = model_config(family, dtype="bfloat16", layers=3, **dense)
  model = with_params(abstract_model(config), random_params(config))
  rounded = decoding_params(model)
  low = {name for name, leaf in rounded.items() if leaf.dtype == jnp.bfloat16}
  assert "embedding" in low
  assert len(low) > 3
  assert not any(word in name for name in low for word in ("norm", "a_log", "bias", "conv"))

  @fast_jit
  def step(params):
    bound = with_params(model, params)
    state, logits = bound.step(bound.init_state(2), jnp.asarray([1, 2]))
    return bound.step(state, jnp.argmax(logits, axis=-1)), logits

  expected, actual = step(get_params(model)), step(rounded)
  for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert np.array_equal(leaf, other)
