"""What is seen of a model is what the model computes, and cutting cuts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.analysis.model import look_into, observable
from dense_jax.analysis.plot import plot_seen
from dense_jax.batch import Batch, Segments
from dense_jax.errors import InputError
from dense_jax.layers.observation import Observer, observing
from tests.builders import model_config, random_model, random_tokens

B, T = 2, 24


def batch(seed, masked=0):
  tokens = random_tokens(seed, B, T + 1)
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  mask = jnp.ones((B, T), bool).at[:, :masked].set(False)
  return Batch(tokens[:, :-1], tokens[:, 1:], mask,
               Segments(positions_BT=positions, ids_BT=jnp.ones((B, T), jnp.int32)))


@pytest.fixture(scope="module")
def seen_and_model():
  model = random_model(model_config("gau_retnet", 1, layers=4))
  return look_into(model, [batch(0), batch(1, masked=4)], samples=80), model


@pytest.mark.slow
def test_what_is_seen_is_what_the_model_computes(seen_and_model):
  seen, model = seen_and_model
  both = batch(0), batch(1, masked=4)
  loss = sum(model.summed_losses(x, z_loss=0.0, chunk=8)[1] for x in both)
  assert seen.lens[-1] == pytest.approx(float(loss) / (B * (2 * T - 4)), rel=1e-5)  # Of targets.
  nll_BT = np.asarray(model.token_losses(batch(0), chunk=8)[0])
  assert seen.loss_at[0] == pytest.approx(nll_BT[:, 0].mean(), rel=1e-5)  # Masked in the other.
  assert len(seen.layers) == 4 and "source_1_ratio" in seen.layers[1]
  assert "source_1_ratio" not in seen.layers[0] and seen.samples == 80
  assert set(seen.similarity) == {"state", "residual"}
  for figures in seen.similarity.values():
    for name in ("cosine", "cka"):
      assert np.diag(figures[name]) == pytest.approx(1)
      assert figures[name] == pytest.approx(figures[name].T)


@pytest.mark.slow
def test_gradients_between_layers_are_those_of_differences(seen_and_model):
  """What a direction at a deep layer sends back is J^T u, also by finite differences."""
  seen, model = seen_and_model
  model, x = observable(model), batch(0)
  shape = (B, T, model.config.width)
  direction = jax.random.normal(jax.random.fold_in(jax.random.key(0), 2), shape)
  direction = direction / jnp.linalg.norm(direction)

  @functools.partial(jax.jit, static_argnums=0)
  def projected(layer, change):
    zeros = tuple(change if i == layer else jnp.zeros(shape) for i in range(4))
    with observing(Observer(added=zeros)) as observer:
      model.hidden(x.tokens_BT, x.segments)
    return jnp.vdot(observer.seen["residual"][2], direction)

  for layer in (0, 1):
    gradient = jax.grad(lambda change, i=layer: projected(i, change))(jnp.zeros(shape))
    assert seen.gradient[2, layer] == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-4)
    step = 1e-2 * gradient / jnp.linalg.norm(gradient)
    change = (projected(layer, step) - projected(layer, -step)) / 2e-2
    assert change == pytest.approx(seen.gradient[2, layer], rel=1e-2)
  assert np.triu(seen.gradient, 1).max() == 0
  assert np.diag(seen.gradient) == pytest.approx(1, rel=1e-5)


@pytest.mark.exhaustive
def test_cut_paths_are_those_of_dense_connections(seen_and_model):
  seen, _ = seen_and_model
  # Layer 1's state depends on layer 0's stream; layer 2 reads it past layer 1's own output.
  assert abs(seen.cut_gradient[2, 0] - seen.gradient[2, 0]) > 1e-6
  base = look_into(random_model(model_config("gau_retnet", 0, layers=3)), [batch(0)], samples=64)
  assert base.gradient == pytest.approx(base.cut_gradient)


@pytest.mark.slow
def test_a_scanned_model_is_seen_as_it_is(seen_and_model):
  seen, model = seen_and_model
  full = dataclasses.replace(model.config, remat="full", block_layers=1)
  assert observable(model).config == dataclasses.replace(full, remat="none", block_layers=4)
  assert np.isfinite(seen.lens).all()


@pytest.mark.exhaustive
def test_attention_has_no_states_and_a_masked_position_no_loss():
  model = random_model(model_config("transformer", 0, layers=2))
  seen = look_into(model, [batch(0, masked=4)], samples=40)
  assert set(seen.similarity) == {"residual"} and set(seen.rank) == {"residual"}
  assert np.isnan(seen.loss_at[:4]).all() and np.isfinite(seen.loss_at[4:]).all()
  np.testing.assert_array_equal(seen.targets_at, [0] * 4 + [B] * (T - 4))


def test_too_few_targets_are_refused():
  model = random_model(model_config("transformer", 0, layers=2))
  with pytest.raises(InputError, match=f"{B} tokens with a target .* expected at least 32"):
    look_into(model, [batch(0, masked=T - 1)])


@pytest.mark.slow
def test_the_picture_and_the_json(seen_and_model, tmp_path):
  seen, _ = seen_and_model
  plot_seen(seen, tmp_path / "seen.png")
  assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
  values = seen.as_dict()
  assert values["similarity"]["state"]["cka"][0][0] == pytest.approx(1)
  assert isinstance(values["loss_at"], list)
