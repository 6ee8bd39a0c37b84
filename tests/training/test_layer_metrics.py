"""Metrics of layers: their values, in every way of running, and no cost when not asked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.config import DataConfig, ExperimentConfig, MeshConfig, TrainConfig
from dense_jax.layers import metrics as metrics_module
from dense_jax.layers.metrics import collecting, record, record_rms
from dense_jax.models.params import (
    abstract_model,
    as_scanned,
    by_layer,
    get_params,
    with_params,
)
from dense_jax.sharding import make_mesh
from dense_jax.training.step import Trainer
from tests.builders import (
    COMPILER_OPTIONS,
    fast_jit,
    model_config,
    packed,
    random_batch,
    random_params,
)
from tests.helpers import assert_trees_close

T, LAYERS = 8, 5
ROWS = [[8], [3, 5], [4, 2], [1, 7]]
BATCH = random_batch(packed(ROWS, time=T))


def _config(mesh=None, train=None, **model):
  options = {"layers": LAYERS, "block_layers": 2} | model
  return ExperimentConfig(
      model=model_config("gau_retnet", 1, "state", vocab_size=16, **options),
      data=DataConfig(seq_len=T),
      train=TrainConfig(batch_size=len(ROWS), loss_chunk=4, **(train or {})),
      mesh=mesh or MeshConfig(data=1),
  )


def _trainer(config):
  return Trainer(config, make_mesh(config.mesh, jax.devices()[: config.mesh.sequence]))


@functools.cache
def _params():
  """Returns equal numbers for every form of the model, by layer."""
  config = _config().model
  return jax.device_get(by_layer(config, random_params(config)))


def _state(trainer, config):
  shapes = trainer.state_shapes
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  state = dataclasses.replace(zeros, params=as_scanned(config.model, _params()))
  return jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), state, shapes)


@functools.cache
def _step(config, name="measured_step"):
  """Returns metrics, and the parameters after the update, by layer, on the host."""
  trainer = _trainer(config)
  state, batch = _state(trainer, config), trainer.put(jax.tree.map(np.asarray, BATCH))
  step = getattr(trainer, name).lower(state, batch).compile(compiler_options=COMPILER_OPTIONS)
  state, metrics = step(state, batch)
  return jax.device_get(metrics), by_layer(config.model, jax.device_get(state.params))


def _layers(metrics):
  return {name: value for name, value in metrics.items() if name.startswith("layers/")}


def _apart():
  config = _config(block_layers=LAYERS).model
  return with_params(abstract_model(config), as_scanned(config, _params()))


@pytest.mark.slow
def test_the_residual_streams_size_after_each_layer():
  @fast_jit
  def by_hand(model):
    x = model.embedding[...][BATCH.tokens_BT]
    bank, sizes = (), []
    for layer in model.stack.prefix_layers:
      x, _, shared = layer(x, BATCH.segments, None, bank)
      bank = (shared,)
      sizes.append(jnp.sqrt(jnp.mean(x**2)))
    return sizes

  metrics, _ = _step(_config())
  expected = {
      f"layers/{layer}/residual_rms": value for layer, value in enumerate(by_hand(_apart()))
  }
  assert_trees_close({name: metrics[name] for name in expected}, expected)


@pytest.mark.slow
def test_each_layers_gradient():
  model = _apart()

  def loss(params):
    total, _, _ = with_params(model, params).summed_losses(BATCH, z_loss=0.0, chunk=4)
    return total / jnp.sum(BATCH.loss_mask_BT)

  gradients = by_layer(model.config, fast_jit(jax.grad(loss))(get_params(model)))
  metrics, _ = _step(_config())
  everywhere = 0.0
  for layer in range(LAYERS):
    own = [leaf for name, leaf in gradients.items() if name.startswith(f"layers.{layer}.")]
    square = sum(float(np.sum(np.square(leaf))) for leaf in own)
    assert_trees_close(metrics[f"layers/{layer}/gradient_norm"], np.float32(np.sqrt(square)))
    everywhere += square
  assert everywhere < metrics["grad_norm"] ** 2  # The rest is the embedding's and the head's.


@pytest.mark.slow
def test_a_measured_step_makes_the_same_update():
  metrics, params = _step(_config())
  plain, expected = _step(_config(), "train_step")
  assert not _layers(plain)
  assert_trees_close({name: metrics[name] for name in plain}, plain)
  assert_trees_close(params, expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"remat": "full", "block_layers": LAYERS},
    *(pytest.param(options, marks=pytest.mark.exhaustive) for options in (
        {"block_layers": LAYERS}, *({"remat": remat} for remat in ("minimal", "reads", "full")))),
], ids=str)
def test_how_layers_run_changes_no_metric(options):
  expected, _ = _step(_config())
  everywhere = ("gradient_norm", "residual_rms", "own_read_rms", "memory_tokens_mean",
                "memory_tokens_std")
  dense = ("gate_1_mean", "gate_1_std", "source_1_read_rms", "source_1_ratio")
  assert _layers(expected).keys() == {
      f"layers/{layer}/{name}"
      for layer in range(LAYERS) for name in (*everywhere, *(dense if layer else ()))
  }
  metrics, _ = _step(_config(**options))
  assert_trees_close(_layers(metrics), _layers(expected))


@pytest.mark.slow
def test_of_a_batch_in_parts_a_metric_is_the_mean():
  model = _apart()
  parts = [jax.tree.map(lambda leaf, i=i: leaf[i::2], BATCH) for i in range(2)]
  measure = fast_jit(
      lambda model, part: model.summed_losses(part, z_loss=0.0, chunk=4, measure=True)
  )
  of_parts = [measure(model, part)[2] for part in parts]
  metrics, _ = _step(_config(train={"accumulate": 2}))
  for layer, (first, second) in enumerate(zip(*of_parts, strict=True)):
    mean = (first["residual_rms"] + second["residual_rms"]) / 2
    assert_trees_close(metrics[f"layers/{layer}/residual_rms"], mean)
    assert abs(first["residual_rms"] - second["residual_rms"]) > 1e-3
  whole, _ = _step(_config())
  norms = [f"layers/{layer}/gradient_norm" for layer in range(LAYERS)]
  assert_trees_close([metrics[name] for name in norms], [whole[name] for name in norms])


@pytest.mark.slow
def test_tokens_on_several_devices_have_one_mean():
  metrics, params = _step(_config(MeshConfig(data=1, sequence=4)))
  expected, expected_params = _step(_config())
  assert_trees_close(_layers(metrics), _layers(expected))
  assert_trees_close(params, expected_params)


@pytest.mark.slow
def test_unmeasured_steps_are_the_program_without_metrics(monkeypatch):
  def text(every):
    trainer = _trainer(_config(train={"layer_metrics_every": every}))
    batch = trainer.batch_shapes(len(ROWS), T)
    function = trainer.step_at(1)
    return function.lower(trainer.state_shapes, batch).as_text()

  off = text(0)
  assert text(7) == off
  monkeypatch.setattr(metrics_module, "_add", lambda *_: None)
  assert text(0) == off


def test_which_steps_are_measured():
  for every, measured in ((0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])):
    trainer = _trainer(_config(train={"layer_metrics_every": every}))
    steps = [step for step in range(1, 7) if trainer.step_at(step) is trainer.measured_step]
    assert steps == measured


@pytest.mark.slow
def test_names_sort_as_layers_do():
  config = _config(layers=12, block_layers=12)
  trainer = _trainer(config)
  batch = trainer.batch_shapes(len(ROWS), T)
  _, metrics = jax.eval_shape(trainer.measured_step, trainer.state_shapes, batch)
  names = [name for name in metrics if name.endswith("residual_rms")]
  assert names == sorted(names)
  assert names[0] == "layers/00/residual_rms" and len(names) == 12


def test_what_is_recorded_where_nobody_collects_is_not_computed():
  def value():
    raise AssertionError("it was computed")

  record("name", value)
  record_rms("name", value)


def test_recording():
  value = jnp.asarray([[3.0, 4.0]], jnp.bfloat16)
  with collecting() as aux:
    record("mean", lambda: value)
    record_rms("rms", lambda: value)
    with collecting() as inner:
      record("mean", lambda: 2 * value)
    with pytest.raises(ValueError, match="'mean' twice"):
      record("mean", lambda: value)
  assert_trees_close(aux, {"mean": np.float32(3.5), "rms": np.float32(12.5**0.5)})
  assert_trees_close(inner, {"mean": np.float32(7)})
  assert all(value.dtype == jnp.float32 for value in aux.values())
  gradient = jax.grad(_recorded)(jnp.ones(3))
  assert not np.any(gradient)


def _recorded(x):
  with collecting() as aux:
    record("mean", lambda: x)
  return aux["mean"]
