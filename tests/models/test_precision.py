"""Models with dtype bfloat16: what stays float32, and the distance from the float32 model."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from dense_jax.batch import Segments, Token
from dense_jax.models.params import get_params, with_params
from dense_jax.models.registry import FAMILIES as REGISTRY
from dense_jax.ops.diagonal.step_sizes import StepSizes
from dense_jax.ops.resolver import IMPLEMENTATIONS
from tests.builders import (
  KINDS,
  STATE_FAMILIES,
  each_kind,
  each_state_family,
  fast_jit,
  model_config,
  packed,
  random_batch,
  random_model,
  random_state,
  random_tokens,
  with_kinds,
  with_options,
)
from tests.helpers import assert_trees_close

B, T = 2, 11
# Parts of a layer's shared states and of the model's state; all else may be bfloat16.
FLOAT32 = {"kernel_RE", "bias_E", "a_NE", "log_decay_BTH", "a_re_ME", "a_im_ME", "dt_E", "b_NE",
           "initial_BNE", "initial_BHPN", "h_BNE", "h_BHPN"}


def _model(kind, **options):
  family, depth, inject = kind
  return random_model(model_config(family, depth, inject, dtype="bfloat16", **options))


def _dtypes(tree):
  """Returns the last name of each array's path -> its dtypes."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    key = next(
        str(getattr(part, "name", getattr(part, "key", ""))) for part in reversed(path)
    )
    found.setdefault(key, set()).add(leaf.dtype)
  return found


def _state_dtypes(state):
  """Returns the dtypes of the states of all layers' recurrences."""
  (name,) = {"h_BNE", "h_BHPN"} & _dtypes(state.layers).keys()
  return _dtypes(state.layers)[name]


@each_kind
def test_parameters_losses_and_logits_are_float32(kind):
  model = _model(kind)
  batch = random_batch(packed([[5, 6], [8]]))
  assert {leaf.dtype for leaf in get_params(model).values()} == {jnp.dtype("float32")}
  logits = jax.eval_shape(lambda: model(batch.tokens_BT, batch.segments))
  losses = jax.eval_shape(lambda: model.token_losses(batch, chunk=4))
  hidden, state = jax.eval_shape(lambda: model.hidden(batch.tokens_BT, batch.segments))
  stepped, step_logits = jax.eval_shape(model.step, state, batch.tokens_BT[:, 0])
  for leaf in (logits, *losses, step_logits):
    assert leaf.dtype == jnp.float32
  assert hidden.dtype == jnp.bfloat16  # Otherwise this test would say nothing.
  for carried in (jax.eval_shape(lambda: model.init_state(B)), state, stepped):
    if kind[0] in STATE_FAMILIES:  # A cache of keys and values is no state that adds up.
      assert _state_dtypes(carried) == {jnp.dtype("float32")}


def _outputs(model, call):
  """Runs the layers one after the other; returns y, state, recurrence and shared value of each."""
  bank, outputs = [], []
  for layer in model.stack.prefix_layers:
    recurrences, connection = [], type(layer.mixer.dense)
    run = connection.run

    def watch(self, x_D, query, states, *rest, run=run, recurrences=recurrences):
      recurrences.append(states)
      return run(self, x_D, query, states, *rest)

    with mock.patch.object(connection, "run", watch):
      output = call(layer.mixer, bank)
    (recurrence,) = recurrences
    outputs.append({
        "y": output.y, "state": output.state, "recurrence": recurrence, "shared": output.shared,
    })
    bank = [output.shared, *bank][: model.config.dense.depth]
  return outputs


@with_kinds([kind for kind in KINDS if kind[0] in STATE_FAMILIES and kind[1] != 1])
@pytest.mark.parametrize("which", [0, -1], ids=["default", "recurrent"])
def test_what_layers_compute_states_with_is_float32(kind, which):
  implementation = IMPLEMENTATIONS[REGISTRY[kind[0]].form][which]
  model = _model(kind, implementation=implementation, layers=3, block_layers=3)
  x_BTD, segments = jnp.zeros((B, T, 16), jnp.bfloat16), Segments(jnp.arange(T)[None])
  sequence = jax.eval_shape(lambda: _outputs(
      model, lambda mixer, bank: mixer(x_BTD, segments, mixer.init_state(B), bank)
  ))
  token = jax.eval_shape(lambda: _outputs(
      model, lambda mixer, bank: mixer(
          x_BTD[:, 0], Token(jnp.zeros(B, jnp.int32)), mixer.init_state(B), bank)
  ))
  decay = {"mamba": "bias_E", "s4": "a_re_ME", "s4d": "a_re_ME"}.get(kind[0], "log_decay_BTH")
  state = "h_BNE" if kind[0] in ("mamba", "s4", "s4d") else "h_BHPN"
  for outputs, expected in ((sequence, {state, decay}), (token, {state})):
    assert len(outputs) == 3
    for output in outputs:
      assert output["y"].dtype == jnp.bfloat16
      found = _dtypes(output)
      assert expected <= found.keys()
      for name in FLOAT32 & found.keys():
        assert found[name] == {jnp.dtype("float32")}, name


def test_step_sizes_of_bfloat16_are_float32():
  steps = StepSizes(jnp.ones((B, T, 2), jnp.bfloat16), jnp.ones((2, 3)), jnp.ones(3))
  assert steps.dt().dtype == jnp.float32


def _distance(actual, expected):
  """Computes the root mean square difference, relative to the scale of the values."""
  return jnp.sqrt(jnp.mean((actual - expected) ** 2)) / jnp.std(expected)


@each_kind
def test_logits_are_near_the_float32_models(kind):
  # From a carried state: a retention's first read is one product k q, near zero now and
  # then, whose sign and so the norm's output would turn with the rounding.
  run = fast_jit(lambda model: model.logits(model.hidden(tokens, None, state)[0]))
  tokens, distances = random_tokens(0, B, T), []
  # Of models this small one may happen to multiply its rounding: the mean of three counts.
  for seed in range(3):
    model = random_model(_model(kind).config, seed)
    state = random_state(model, [3, 9])
    distances.append(_distance(run(model), run(with_options(model, dtype="float32"))))
  assert min(distances) > 1e-4  # It did compute in bfloat16.
  assert_trees_close(jnp.mean(jnp.stack(distances)), 0.0, "bfloat16")


@each_state_family
def test_decoding_is_near_the_sequence(family):
  model = _model((family, 1, "state"))
  tokens, state = random_tokens(0, B, T), random_state(model, [3, 9])

  @fast_jit
  def run(model):
    after, logits = jax.lax.scan(model.step, state, tokens.T)
    return jnp.swapaxes(logits, 0, 1), model.logits(model.hidden(tokens, None, state)[0]), after

  actual, expected, after = run(model)
  assert_trees_close(_distance(actual, expected), 0.0, "bfloat16")
  assert _state_dtypes(after) == {jnp.dtype("float32")}


@each_state_family
def test_gradients_and_their_parameters_are_float32(family):
  model = _model((family, 2, "state"))
  batch = random_batch(packed([[5, 6], [8]]))

  def loss(params):
    return with_params(model, params).summed_losses(batch, z_loss=0.0, chunk=4)[0]

  gradients = jax.eval_shape(jax.grad(loss), get_params(model))
  assert {leaf.dtype for leaf in gradients.values()} == {jnp.dtype("float32")}
