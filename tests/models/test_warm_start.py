"""A model that begins as another one with fewer dense connections computes the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.errors import InputError
from dense_jax.models.params import abstract_model, by_layer, get_params, init_params, with_params
from dense_jax.models.warm_start import check_warm_start, new_parameters, warm_start
from tests.builders import (
  INPUT_FAMILIES,
  STATE_FAMILIES,
  fast_jit,
  model_config,
  packed,
  random_batch,
  random_params,
)
from tests.helpers import assert_trees_close

BATCH = random_batch(packed([[4, 3], [7]]))
BASE = {"depth": 0}
# (options of the model to begin with, options of the one that begins); `gate_init=normal` shows
# that new gates are closed whatever fresh ones are.
STATE_CASES = {
    "0-2": (BASE, {"depth": 2, "gate_init": "normal"}),
    "1-2": ({"depth": 1}, {"depth": 2, "gate_sharing": "per_source", "gate_init": "normal"}),
    "1-2-linear": ({"depth": 1}, {"depth": 2, "transition": "linear"}),
    "1-2-concat": ({"depth": 1}, {"depth": 2, "fusion": "concat"}),
    "0-2-concat": (BASE, {"depth": 2, "fusion": "concat", "gate_init": "normal"}),
    "0-2-gated": (BASE, {"depth": 2, "fusion": "gated", "gate_init": "normal"}),
    "0-2-attention": (BASE, {"depth": 2, "fusion": "attention", "gate_init": "normal"}),
}
MORE_STATE_CASES = {
    "0-1-mlp": (BASE, {"depth": 1, "transition": "mlp"}),
    "0-2-state-gate": (BASE, {"depth": 2, "gate": "channel_state", "gate_init": "normal"}),
    "0-2-none-linear": (BASE, {"depth": 2, "gate": "none", "transition": "linear"}),
    "0-2-none-concat": (BASE, {"depth": 2, "gate": "none", "fusion": "concat"}),
    "0-2-none-gated": (BASE, {"depth": 2, "gate": "none", "fusion": "gated"}),
    "0-1-fused": (BASE, {"depth": 1, "source": "fused"}),
    "1-1-state-gate": ({"depth": 1}, {"depth": 1, "gate": "channel_state", "gate_init": "normal"}),
    "1-2-gated": (
        {"depth": 1, "fusion": "gated"},
        {"depth": 2, "fusion": "gated", "gate_sharing": "per_source", "gate_init": "normal"},
    ),
    "2-2-per-source": ({"depth": 2}, {"depth": 2, "gate_sharing": "per_source"}),
    "2-2-mlp": ({"depth": 2}, {"depth": 2, "transition": "mlp"}),
    "stride": ({"depth": 2, "stride": 2}, {"depth": 2, "gate_init": "normal"}),
    "start": ({"depth": 1, "start": 2}, {"depth": 1, "gate_init": "normal"}),
    "concat-3": (
        {"depth": 1, "fusion": "concat"}, {"depth": 3, "fusion": "concat"},
    ),
    "linear-3": (
        {"depth": 1, "transition": "linear"}, {"depth": 3, "transition": "linear"},
    ),
    "per-source-3": (
        {"depth": 2, "gate_sharing": "per_source"},
        {"depth": 3, "gate_sharing": "per_source", "gate_init": "normal"},
    ),
    "1-2-none-linear": (
        {"depth": 1, "gate": "none"}, {"depth": 2, "gate": "none", "transition": "linear"},
    ),
}
INPUT_CASES = {
    "0-2-inputs": (
        BASE, {"depth": 2, "inject": "inputs", "input_norm": False, "gate_init": "normal"},
    ),
    "1-2-inputs": (
        {"depth": 1, "inject": "inputs"},
        {"depth": 2, "inject": "inputs", "gate_sharing": "per_source", "gate_init": "normal"},
    ),
}


QUICK = (("gau_retnet", "0-2-gated"),)


def _cases():
  """Yields all cases: one of `make test`, of every eighteenth change one family's as slow."""
  for cases, families in ((STATE_CASES, STATE_FAMILIES), (INPUT_CASES, INPUT_FAMILIES),
                          (MORE_STATE_CASES, STATE_FAMILIES)):
    for number, (name, (before, after)) in enumerate(cases.items()):
      for family in families:
        slow = family == families[number % len(families)] and number % 18 == 0
        mark = pytest.mark.slow if slow else pytest.mark.exhaustive
        marks = () if (family, name) in QUICK else (mark,)
        yield pytest.param(family, before, after, id=f"{family}-{name}", marks=marks)


def config(family, options):
  return model_config(family, layers=4, block_layers=4, **options)


def fresh(config):
  return fast_jit(lambda: init_params(config, jax.random.key(1)))()


def losses(config, params):
  return with_params(abstract_model(config), params).token_losses(BATCH, chunk=3)[0]


@pytest.mark.parametrize(("family", "before", "after"), list(_cases()))
def test_the_new_model_computes_what_the_old_one_does(family, before, after):
  source, target = config(family, before), config(family, after)
  params = random_params(source)
  started = warm_start(source, target, params, fresh(target))
  expected = np.asarray(fast_jit(lambda params: losses(source, params))(params), np.float64)
  actual = np.asarray(fast_jit(lambda params: losses(target, params))(started), np.float64)
  assert_trees_close(actual, expected)
  assert float(actual.mean()) == pytest.approx(float(expected.mean()), rel=0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("after", [
    pytest.param(STATE_CASES["0-2-gated"][1], id="0-2-gated"),
    *(pytest.param(cases[name][1], id=name, marks=pytest.mark.exhaustive) for cases, name in (
        (INPUT_CASES, "0-2-inputs"), (STATE_CASES, "0-2-concat"),
        (MORE_STATE_CASES, "0-2-none-linear"), (MORE_STATE_CASES, "0-2-none-concat"),
    )),
])
def test_what_is_closed_learns(after):
  source, target = config("gau_retnet", BASE), config("gau_retnet", after)
  started = warm_start(source, target, random_params(source), fresh(target))
  gradients = fast_jit(jax.grad(lambda params: jnp.sum(losses(target, params))))(started)
  by_name = by_layer(target, gradients)
  for layer in range(1, 4):
    closed = [
        np.abs(gradient).max() for name, gradient in by_name.items()
        if name.startswith(f"layers.{layer}.mixer.dense.")
    ]
    assert max(closed) > 1e-6


def test_scanned_layers_begin_as_unrolled_ones_do():
  source = model_config("gau_retnet", 1, layers=6)
  target = model_config("gau_retnet", 2, layers=6, gate_sharing="per_source", remat="full")
  assert source.block_layers == 0
  params = random_params(source)
  started = warm_start(source, target, params, fresh(target))
  assert started.keys() == get_params(abstract_model(target)).keys()
  old, new = by_layer(source, params), by_layer(target, started)
  for name, value in old.items():
    np.testing.assert_array_equal(new[name], value, err_msg=name)
  copied, added = new_parameters(source, target)
  assert copied == sum(value.size for value in old.values())
  assert added == sum(value.size for value in new.values()) - copied > 0


@pytest.mark.parametrize(("before", "after", "message"), [
    ({"depth": 1}, {"depth": 2}, r"gate_sharing = 'shared' is not valid: expected per_source, or"),
    ({"depth": 2}, {"depth": 1}, r"layer 2 would read layers 1, and reads 1, 0 in"),
    ({"depth": 3}, {"depth": 3, "reads": "first"}, r"layer 2 would read layers 0, 1, and reads 1"),
    ({"depth": 1}, BASE, r"layer 1 would read layers none, and reads 0 in"),
    ({"depth": 1}, {"depth": 1, "start": 2}, r"layer 1 would read layers none, and reads 0 in"),
    (BASE, {"depth": 2, "gate": "none"}, r"gate = 'none' is not valid: expected channel or"),
    (BASE, {"depth": 2, "gate": "none", "transition": "mlp"}, r"gate = 'none' is not valid"),
    (BASE, {"depth": 1, "inject": "inputs"}, r"input_norm = True is not valid: expected false"),
    (BASE, {"depth": 1, "inject": "inputs", "input_norm": False, "gate": "none"}, "gate = 'none'"),
    ({"depth": 1}, {"depth": 1, "inject": "inputs"}, r"inject = 'inputs' is not valid: expected"),
    ({"depth": 1}, {"depth": 1, "fusion": "gated"}, r"fusion = 'gated' .* expected add or concat"),
    ({"depth": 1, "fusion": "attention"}, {"depth": 2, "fusion": "attention"}, r"depth = 2 is not"),
    ({"depth": 1, "transition": "linear"}, {"depth": 1}, r"transition = 'identity' .* linear in a"),
    ({"depth": 1, "gate": "none"}, {"depth": 1}, r"gate = 'channel' is not valid: expected none"),
    ({"depth": 1}, {"depth": 1, "source": "fused"}, r"source = 'fused' is not valid: expected raw"),
    ({"depth": 1}, {"depth": 1, "gate_reduction": 2}, r"gate_reduction = 2 .* expected 4"),
    ({"depth": 2, "gate_sharing": "per_source"}, {"depth": 2}, r"expected per_source in a warm"),
])
def test_what_has_no_start_that_changes_nothing_is_refused_by_name(before, after, message):
  with pytest.raises(InputError, match=message):
    check_warm_start(config("mamba", before), config("mamba", after))


@pytest.mark.parametrize(("changes", "lines"), [
    ({"width": 24, "layers": 3}, ["config.model.layers: it has 2, now 3",
                                  "config.model.width: it has 16, now 24"]),
    ({"vocab_size": 12}, ["config.model.vocab_size: it has 11, now 12"]),
    ({"tie_embeddings": True}, ["config.model.tie_embeddings: it has False, now True"]),
    ({"state_size": 4}, ["config.model.mixer.state_size: it has 3, now 4"]),
])
def test_another_model_is_refused_with_all_that_differs(changes, lines):
  with pytest.raises(InputError) as error:
    check_warm_start(model_config("mamba"), model_config("mamba", **changes))
  said = str(error.value).splitlines()
  assert [line.strip() for line in said[1:-1]] == lines
  assert said[-1].startswith("Expected --config.model.")


def test_another_family_is_refused():
  with pytest.raises(InputError, match=r"config\.model\.family: it has 'mamba', now"):
    check_warm_start(model_config("mamba"), model_config("mamba2"))


@pytest.mark.parametrize("changes", [
    {"dtype": "bfloat16"}, {"chunk": 8, "remat": "full", "implementation": "recurrent"},
    {"dt_max": 0.2}, {"dt_rank": 1},
])
def test_what_may_differ(changes):
  source = model_config("mamba")
  source = dataclasses.replace(source, mixer=dataclasses.replace(source.mixer, dt_rank=0))
  check_warm_start(source, model_config("mamba", **{"dt_rank": 0, **changes}))
