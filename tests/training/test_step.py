"""The train step: meshes, accumulation, donation, the loss and its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.config import ExperimentConfig, MeshConfig, OptimizerConfig, TrainConfig
from dense_jax.errors import InputError
from dense_jax.models.params import abstract_model, get_params, with_params
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

T = 9
# Eight rows; documents, padding, and two rows with fewer targets than the others.
ROWS = [[4, 5], [9], [2, 3, 4], [7], [9], [1, 8], [3], [5, 2]]
KINDS = {
    "mamba": ("mamba", 2, "state"), "gau_retnet": ("gau_retnet", 2, "inputs"),
    "mamba2": ("mamba2", 2, "state"),
}
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}


def _config(family="gau_retnet", mesh=None, **train):
  """Returns AdamW with a large epsilon, so that an update is nearly the gradient itself."""
  depth, inject = KINDS[family][1:]
  model = model_config(family, depth, inject, vocab_size=16, layers=3)
  return ExperimentConfig(
      model=model,
      optimizer=OptimizerConfig(
          learning_rate=1.0, schedule="constant", warmup_fraction=0.0, epsilon=10.0,
          clip_norm=0.0, weight_decay=0.0,
      ),
      train=TrainConfig(steps=4, batch_size=8, loss_chunk=4, **train),
      mesh=mesh or MeshConfig(data=1),
  )


def _mesh(config):
  mesh = config.mesh
  return make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])


def _start(trainer, config):
  """Returns a first state with perturbed parameters, placed as the trainer places them."""
  shapes = trainer.state_shapes
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  state = dataclasses.replace(zeros, params=random_params(config.model))
  return jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), state, shapes)


@functools.cache
def _after_two_steps(config):
  """Returns metrics of both steps, and the parameters after them, on the host."""
  trainer = Trainer(config, _mesh(config))
  state, metrics = _start(trainer, config), []
  batch = trainer.put(_batch(0))
  step = trainer.train_step.lower(state, batch).compile(compiler_options=COMPILER_OPTIONS)
  for seed in (0, 1):
    state, values = step(state, trainer.put(_batch(seed)))
    metrics.append(jax.device_get(values))
  assert int(state.step) == 2
  return metrics, jax.device_get(state.params)


def _batch(seed):
  return jax.tree.map(np.asarray, random_batch(packed(ROWS, time=T), seed))


@pytest.mark.parametrize("mesh", [
    pytest.param(mesh, marks=pytest.mark.slow if mesh == "fsdp" else pytest.mark.exhaustive)
    for mesh in MESHES
])
def test_a_mesh_changes_nothing(mesh):
  one_device = _after_two_steps(_config("gau_retnet"))
  start = random_params(_config("gau_retnet").model)
  moved = [np.abs(one_device[1][name] - value).max() for name, value in start.items()]
  assert min(moved) > 1e-5  # The comparison is of updates, not of what stood still.
  assert_trees_close(_after_two_steps(_config("gau_retnet", MESHES[mesh])), one_device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["mamba", "mamba2", "gau_retnet"])
def test_kernels_on_a_mesh_change_nothing(family):
  def config(mesh=None, implementation="auto"):
    plain = _config(family, mesh)
    model = dataclasses.replace(plain.model, implementation=implementation)
    return dataclasses.replace(plain, model=model)

  actual = _after_two_steps(config(MESHES["tensor"], "pallas"))
  assert_trees_close(actual, _after_two_steps(config()))


def test_parameters_and_moments_are_sharded_as_their_axes_say():
  config = _config("gau_retnet", MESHES["tensor"])
  trainer = Trainer(config, _mesh(config))
  name = "stack.prefix_layers.1.mixer.q_proj.kernel"
  shapes = trainer.state_shapes
  assert tuple(shapes.params[name].sharding.spec) == ("fsdp", "tensor")
  moments = [
      leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.opt_state)
      if name in jax.tree_util.keystr(path)
  ]
  assert len(moments) == 2
  for leaf in moments:
    assert leaf.sharding == shapes.params[name].sharding
  state = trainer.init(0)
  assert state.params[name].addressable_shards[0].data.shape == (8, 4)
  for made, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
    assert (made.shape, made.dtype) == (shape.shape, shape.dtype)
    assert made.sharding.is_equivalent_to(shape.sharding, made.ndim)


@pytest.mark.parametrize("accumulate", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_accumulation_changes_nothing(accumulate):
  """The parts of the batch have different numbers of targets."""
  expected = _after_two_steps(_config())
  assert_trees_close(_after_two_steps(_config(accumulate=accumulate)), expected)


@pytest.mark.slow
def test_accumulation_on_a_mesh_changes_nothing():
  config = _config(mesh=MeshConfig(data=2, fsdp=2), accumulate=2)
  assert_trees_close(_after_two_steps(config), _after_two_steps(_config()))


def test_the_old_state_is_donated():
  config = _config()
  trainer = Trainer(config, _mesh(config))
  state, batch = _start(trainer, config), trainer.put(_batch(0))
  step = trainer.train_step.lower(state, batch).compile(compiler_options=COMPILER_OPTIONS)
  new, _ = step(state, batch)
  assert all(leaf.is_deleted() for leaf in state.params.values())
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


def _mean_loss(model, batch, z_loss=0.0):
  """Computes the mean over targets of -log softmax(logits)[target] + z_loss (log Z)^2."""
  logits_BTV = model(batch.tokens_BT, batch.segments)
  log_z_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))
  picked_BT = jnp.sum(logits_BTV * jax.nn.one_hot(batch.targets_BT, 16), axis=-1)
  losses_BT = log_z_BT - picked_BT + z_loss * log_z_BT**2
  return jnp.sum(jnp.where(batch.loss_mask_BT, losses_BT, 0.0)) / jnp.sum(batch.loss_mask_BT)


def test_the_metrics_are_the_definitions():
  config = _config()
  metrics, _ = _after_two_steps(config)
  model, batch = abstract_model(config.model), _batch(0)

  @fast_jit
  def direct(params):
    return jax.value_and_grad(lambda params: _mean_loss(with_params(model, params), batch))(params)

  loss, gradients = direct(random_params(config.model))
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradients.values()))
  expected = {"loss": loss, "grad_norm": norm, "learning_rate": 1.0,
              "targets": float(np.sum(batch.loss_mask_BT)),
              "skipped_steps": 0.0, "skipped_in_a_row": 0.0}
  assert_trees_close(metrics[0], expected)
  assert 0 < metrics[0]["targets"] < batch.tokens_BT.size
  assert metrics[1]["loss"] != metrics[0]["loss"]


@pytest.mark.slow
def test_z_loss_and_its_gradient():
  config = _config().model
  model, batch = abstract_model(config), random_batch(packed(ROWS, time=T))
  targets = jnp.sum(batch.loss_mask_BT)

  def chunked(params):
    objective, nll, _ = with_params(model, params).summed_losses(batch, z_loss=0.1, chunk=4)
    return objective / targets, nll / targets

  @fast_jit
  def both(params):
    direct = jax.value_and_grad(lambda p: _mean_loss(with_params(model, p), batch, 0.1))(params)
    plain = _mean_loss(with_params(model, params), batch)
    return jax.value_and_grad(chunked, has_aux=True)(params), direct, plain

  ((objective, nll), gradients), direct, plain = both(random_params(config))
  assert_trees_close((objective, gradients), direct)
  assert_trees_close(nll, plain)  # The reported loss has no z_loss in it.
  assert objective > nll + 0.01


def test_a_batch_without_targets_has_no_gradient_and_no_nan():
  config = _config()
  trainer = Trainer(config, _mesh(config))
  state, empty = _start(trainer, config), _batch(0)
  empty = dataclasses.replace(empty, loss_mask_BT=np.zeros_like(empty.loss_mask_BT))
  batch = trainer.put(empty)
  step = trainer.train_step.lower(state, batch).compile(compiler_options=COMPILER_OPTIONS)
  new, metrics = step(state, batch)
  assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0.0, 0.0)
  assert_trees_close(jax.device_get(new.params), random_params(config.model))


@pytest.mark.parametrize(("mesh", "train", "words"), [
    (MeshConfig(data=3), {}, ("config.train.batch_size = 8", "multiple", "3")),
    (MeshConfig(data=4), {"accumulate": 4}, ("config.train.batch_size = 8", "16")),
])
def test_a_batch_that_the_mesh_does_not_divide(mesh, train, words):
  config = _config(mesh=mesh, **train)
  with pytest.raises(InputError) as error:
    Trainer(config, _mesh(config))
  assert all(word in str(error.value) for word in words), error.value


def test_a_parameter_that_the_mesh_does_not_divide():
  config = _config(mesh=MeshConfig(data=1, tensor=2))
  config = dataclasses.replace(
      config, model=dataclasses.replace(config.model, vocab_size=15)
  )
  with pytest.raises(InputError) as error:
    Trainer(config, _mesh(config))
  for word in ("config.mesh.tensor = 2", "15", "embedding"):
    assert word in str(error.value)


@pytest.mark.parametrize("mesh", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=-1)])
def test_a_mesh_that_is_not_the_devices(mesh):
  with pytest.raises(InputError, match=r"config\.mesh"):
    make_mesh(mesh)


def test_shapes_for_ahead_of_time_compilation_are_those_that_run():
  config = _config()
  trainer = Trainer(config, _mesh(config))
  real, shapes = trainer.put(_batch(0)), trainer.batch_shapes(8, T)
  for leaf, shape in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
    assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
  assert get_params(trainer.model).keys() == trainer.state_shapes.params.keys()


@pytest.mark.parametrize(("family", "implementation", "remat"), [
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("mamba2", "pallas", "full"), ("mamba", "triton", "full"))),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
        ("mamba2", "pallas", "minimal"), ("mamba2", "triton", "minimal"),
        ("mamba2", "triton", "full"), ("mamba", "pallas", "minimal"),
        ("mamba", "pallas", "full"), ("mamba", "triton", "minimal"))),
    *(pytest.param(family, implementation, "reads", marks=pytest.mark.exhaustive)
      for family in ("mamba2", "mamba") for implementation in ("pallas", "triton")),
])
def test_kernels_can_be_differentiated_where_layers_are_computed_again(
    family, implementation, remat
):
  """A train step drops the final states, and some versions of jax lose count of what is left."""
  model = model_config(
      family, 2, "state", vocab_size=16, layers=8, remat=remat, block_layers=2,
      implementation=implementation,
  )
  config = dataclasses.replace(_config(), model=model, mesh=MeshConfig(data=8))
  trainer = Trainer(config, make_mesh(config.mesh))
  text = trainer.train_step.lower(trainer.state_shapes, trainer.batch_shapes(8, T)).as_text()
  assert "while" in text
