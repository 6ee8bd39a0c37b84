"""Rules for weight decay, and the schedules' values."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.config import OptimizerConfig
from dense_jax.errors import InputError
from dense_jax.models.params import abstract_model, get_params
from dense_jax.training.optimizer import WEIGHT_DECAY, decay_mask, learning_rate, make_optimizer
from tests.builders import FAMILIES, INPUT_FAMILIES, STATE_FAMILIES, model_config, normal
from tests.helpers import assert_trees_close

OPTIONS = [
    {"depth": 0},
    {"depth": 2, "transition": "linear"},
    {"depth": 2, "transition": "mlp", "fusion": "concat", "gate": "channel_state"},
    {"depth": 2, "fusion": "attention"},
    {"depth": 2, "inject": "inputs"},
    {"depth": 1, "inject": "inputs", "input_norm": False},
]
NEVER = ("a_log", "d", "dt_bias", "scale", "bias", "linear", "log_a", "a_imag", "p", "b", "c",
         "log_dt")
ALWAYS = ("kernel", "embedding", "head", "down", "up")
MODELS = [
    (family, options) for family in FAMILIES for options in OPTIONS
    if not options["depth"] or family in INPUT_FAMILIES
    or (family in STATE_FAMILIES and "inject" not in options)
]


@pytest.mark.parametrize("layers", [3, 7], ids=["apart", "scanned"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "options"), MODELS, ids=str)
def test_every_parameter_matches_exactly_one_rule(family, options, tied, layers):
  config = model_config(family, layers=layers, tie_embeddings=tied, **options)
  names = list(get_params(abstract_model(config)))
  mask = decay_mask(names)
  assert list(mask) == names
  for name, decays in mask.items():
    kind = name.rpartition(".")[2]
    assert kind in NEVER + ALWAYS, name
    assert decays == (kind in ALWAYS), name


def test_every_rule_is_about_some_parameter():
  names = {
      name for family, options in MODELS
      for name in get_params(abstract_model(model_config(family, **options)))
  }
  for pattern in WEIGHT_DECAY:
    assert any(re.fullmatch(pattern, name) for name in names), pattern


@pytest.mark.parametrize("name", ["stack.head.0.mixer.new", "heads", "embedding.offset"])
def test_an_unmatched_parameter_is_an_error_that_names_it(name):
  with pytest.raises(ValueError, match=name):
    decay_mask(["embedding", name])


def test_several_matching_rules_are_an_error(monkeypatch):
  monkeypatch.setitem(WEIGHT_DECAY, r".*\.dt_.*", True)
  with pytest.raises(ValueError, match=r"mixer\.dt_bias matches 2"):
    decay_mask(["stack.head.0.mixer.dt_bias"])


# 112 updates, 11 of which are the warm-up: the other 101 have a middle one.
STEPS, WARMUP, PEAK, FINAL = 112, 11, 0.5, 0.1 * 0.5


def _schedule(name, **options):
  config = OptimizerConfig(
      learning_rate=PEAK, schedule=name, warmup_fraction=0.1, final_fraction=0.1, **options
  )
  return learning_rate(config, STEPS)


@pytest.mark.parametrize("name", ["constant", "cosine", "polynomial", "wsd"])
def test_the_warm_up_is_linear_and_begins_above_zero(name):
  schedule = _schedule(name)
  expected = [PEAK * (update + 1) / WARMUP for update in range(WARMUP)]
  assert_trees_close([float(schedule(update)) for update in range(WARMUP)], expected)
  assert_trees_close(float(schedule(WARMUP)), PEAK)


@pytest.mark.parametrize(("name", "middle"), [
    ("constant", PEAK), ("cosine", (PEAK + FINAL) / 2), ("polynomial", (PEAK + FINAL) / 2),
    ("wsd", PEAK),
])
def test_the_middle(name, middle):
  assert_trees_close(float(_schedule(name)((WARMUP + STEPS - 1) // 2)), middle)


@pytest.mark.parametrize("name", ["constant", "cosine", "polynomial", "wsd"])
def test_the_last_update_has_the_final_fraction_of_the_peak(name):
  """OptimizerConfig says: "the last learning rate, as a fraction of the peak"."""
  expected = PEAK if name == "constant" else FINAL
  assert_trees_close(float(_schedule(name)(STEPS - 1)), expected)


@pytest.mark.parametrize("name", ["constant", "cosine", "polynomial", "wsd"])
def test_after_the_warm_up_the_rate_never_rises(name):
  rates = np.array([_schedule(name)(update) for update in range(WARMUP, STEPS)])
  assert np.all(np.diff(rates) <= 1e-9)
  assert np.all(rates >= FINAL * (1 - 1e-6))


def test_the_power_of_a_polynomial():
  quarter = _schedule("polynomial", power=2.0)((WARMUP + STEPS - 1) // 2)
  assert_trees_close(float(quarter), FINAL + (PEAK - FINAL) / 4)


def test_wsd_is_stable_and_then_falls_linearly():
  schedule = _schedule("wsd", decay_fraction=0.25)
  rates = np.array([schedule(update) for update in range(STEPS)])
  stable = STEPS - round(0.25 * STEPS)
  np.testing.assert_allclose(rates[WARMUP:stable], PEAK, rtol=1e-6)
  falls = np.diff(rates[stable:])
  np.testing.assert_allclose(falls, falls[0], rtol=1e-3)
  assert falls[0] < 0


@pytest.mark.parametrize("name", ["constant", "cosine", "polynomial", "wsd"])
def test_no_warm_up_and_one_step(name):
  config = OptimizerConfig(learning_rate=PEAK, schedule=name, warmup_fraction=0.0)
  assert_trees_close(float(learning_rate(config, STEPS)(0)), PEAK)
  for warmup in (0.0, 0.5, 1.0):
    config = OptimizerConfig(
        learning_rate=PEAK, schedule=name, warmup_fraction=warmup, decay_fraction=0.0
    )
    assert math.isfinite(float(learning_rate(config, 1)(0)))


@pytest.mark.parametrize("name", ["constant", "cosine", "polynomial", "wsd"])
def test_a_schedule_has_its_own_length_and_stays_where_it_ends(name):
  own = [_schedule(name, schedule_steps=STEPS)(update) for update in range(3 * STEPS)]
  steps = learning_rate(
      OptimizerConfig(learning_rate=PEAK, schedule=name, warmup_fraction=0.1, schedule_steps=STEPS),
      7,
  )
  assert own == [steps(update) for update in range(3 * STEPS)]
  np.testing.assert_array_equal(own[:STEPS], [_schedule(name)(update) for update in range(STEPS)])
  assert set(map(float, own[STEPS - 1:])) == {float(own[STEPS - 1])}


def test_adamw_by_hand():
  """Two updates of decoupled AdamW with clipping; only the kernel decays."""
  config = OptimizerConfig(
      learning_rate=0.1, schedule="constant", warmup_fraction=0.0, beta1=0.8, beta2=0.9,
      epsilon=1e-6, weight_decay=0.3, clip_norm=0.5,
  )
  params = {"norm.scale": normal(0, 4), "stack.head.0.mixer.out_proj.kernel": normal(1, 4, 3)}
  optimizer = make_optimizer(config, 10, list(params))
  state = optimizer.init(params)
  mean, square = ({name: 0.0 for name in params} for _ in range(2))
  expected = {name: np.asarray(value) for name, value in params.items()}
  for update in (1, 2):
    gradients = {name: normal(update, *value.shape) for name, value in params.items()}
    changes, state = optimizer.update(gradients, state, params)
    params = jax.tree.map(jnp.add, params, changes)
    norm = np.sqrt(sum(np.sum(np.square(value)) for value in gradients.values()))
    for name, value in gradients.items():
      clipped = np.asarray(value) * min(1, 0.5 / norm)
      mean[name] = 0.8 * mean[name] + 0.2 * clipped
      square[name] = 0.9 * square[name] + 0.1 * clipped**2
      unbiased = mean[name] / (1 - 0.8**update), square[name] / (1 - 0.9**update)
      change = unbiased[0] / (np.sqrt(unbiased[1]) + 1e-6)
      change = change + 0.3 * expected[name] * name.endswith("kernel")
      expected[name] = expected[name] - 0.1 * change
  assert_trees_close(params, expected)


def test_the_state_has_one_form_with_clipping_and_without():
  """A run can change from one to the other."""
  params = {"embedding": normal(0, 4, 3)}
  states = [
      make_optimizer(OptimizerConfig(clip_norm=norm), 10, list(params)).init(params)
      for norm in (0.0, 1.0)
  ]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.parametrize(("first", "second"), [("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_moments_are_kept_in_their_dtypes_and_computed_in_float32(first, second):
  config = OptimizerConfig(first_moment_dtype=first, second_moment_dtype=second, clip_norm=0.0)
  low = make_optimizer(config, 10, ["embedding"])
  exact = make_optimizer(OptimizerConfig(clip_norm=0.0), 10, ["embedding"])
  params = {"embedding": normal(0, 16, 8)}
  low_state, exact_state = low.init(params), exact.init(params)
  for update in range(3):
    gradients = {"embedding": normal(1 + update, 16, 8)}
    changes, low_state = low.update(gradients, low_state, params)
    expected, exact_state = exact.update(gradients, exact_state, params)
    assert changes["embedding"].dtype == jnp.float32
    scale = float(jnp.std(expected["embedding"]))
    assert_trees_close(changes, expected, "bfloat16", scale=scale)
  _, adam, *_ = low_state
  assert (adam.mu["embedding"].dtype, adam.nu["embedding"].dtype) == (first, second)


def test_a_bfloat16_second_moment_that_would_stand_still_is_refused():
  with pytest.raises(InputError, match=r"second_moment_dtype = 'bfloat16' .* beta2 <= 0.99"):
    OptimizerConfig(second_moment_dtype="bfloat16", beta2=0.999)
