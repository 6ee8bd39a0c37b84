"""A run resumes whatever block_layers and remat were before: a checkpoint knows only layers."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from dense_jax.config import DataConfig, ExperimentConfig, MeshConfig, ModelConfig, TrainConfig
from dense_jax.models.params import by_layer
from dense_jax.sharding import make_mesh
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.checkpoint_reader import CheckpointReader
from dense_jax.training.step import Trainer
from tests.builders import COMPILER_OPTIONS, model_config, packed, random_batch
from tests.helpers import TOLERANCE, assert_trees_close

T, LAYERS = 8, 11
ROWS = [[8], [3, 5], [4, 2], [1, 7], [8], [6], [2, 6], [5, 3]]


def _config(block_layers, remat="none", mesh=None, layers=LAYERS) -> ExperimentConfig:
  model = model_config(
      "gau_retnet", 1, "inputs", vocab_size=16, layers=layers, block_layers=block_layers,
      remat=remat,
  )
  train = TrainConfig(batch_size=len(ROWS), loss_chunk=4)
  return ExperimentConfig(
      model=model, data=DataConfig(seq_len=T), train=train, mesh=mesh or MeshConfig(data=1)
  )


def _trainer(config):
  devices = jax.devices()[: config.mesh.data * config.mesh.fsdp]
  return Trainer(config, make_mesh(config.mesh, devices))


def _train(trainer, state, seeds):
  """Returns the state after a batch of each seed, and the losses."""
  losses, step = [], None
  for seed in seeds:
    rows = jax.tree.map(np.asarray, random_batch(packed(ROWS, time=T), seed))
    batch = trainer.put(rows)
    step = step or trainer.train_step.lower(state, batch).compile(
        compiler_options=COMPILER_OPTIONS
    )
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  return state, losses


def _save(folder, model: ModelConfig, state):
  checkpoints = Checkpoints(epath.Path(folder), model)
  assert checkpoints.save(state, 1, {"row": 7}, None)
  checkpoints.close()


def _restore(folder, model: ModelConfig, shapes):
  checkpoints = CheckpointReader(epath.Path(folder), model)
  state, position = checkpoints.restore(shapes, 1)
  step, params, _ = checkpoints.restore_params(shapes.params, "latest")
  assert (position, step) == ({"row": 7}, 1)
  assert_trees_close(jax.device_get(params), jax.device_get(state.params), scale=0.0)
  return state


def assert_same_bits(actual, expected):
  """Checks that two trees of arrays are bitwise equal."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(np.asarray(left), np.asarray(right), strict=True)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """Makes a run of block_layers=5, saved after two steps: folder, state by layer, later losses."""
  folder, config = tmp_path_factory.mktemp("begun") / "checkpoints", _config(5)
  trainer = _trainer(config)
  state, _ = _train(trainer, trainer.init(0), (0, 1))
  _save(folder, config.model, state)
  layers = by_layer(config.model, jax.device_get(state))
  _, losses = _train(trainer, state, (2, 3))
  return folder, layers, losses


@pytest.mark.parametrize(("block_layers", "remat"), [
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (1, "none"), (4, "full"), (LAYERS, "none"))),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
        (1, "minimal"), (1, "full"), (4, "none"), (5, "minimal"), (5, "reads"))),
])
def test_a_run_goes_on_with_layers_scanned_in_another_way(begun, block_layers, remat):
  folder, layers, losses = begun
  config = _config(block_layers, remat)
  trainer = _trainer(config)
  state = _restore(folder, config.model, trainer.state_shapes)
  for leaf, shape in zip(
      jax.tree.leaves(state), jax.tree.leaves(trainer.state_shapes), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
  assert_same_bits(by_layer(config.model, jax.device_get(state)), layers)
  assert any(np.any(leaf) for leaf in jax.tree.leaves(layers.opt_state[1]))
  _, actual = _train(trainer, state, (2, 3))
  np.testing.assert_allclose(actual, losses, **TOLERANCE["float32"])


@pytest.mark.slow
def test_a_mesh_restores_what_another_one_saved(tmp_path):
  before = _config(2, mesh=MeshConfig(data=1, fsdp=4), layers=5)
  saved = _trainer(before).init(0)
  _save(tmp_path / "checkpoints", before.model, saved)
  now = _config(1, mesh=MeshConfig(data=1, fsdp=2), layers=5)
  trainer = _trainer(now)
  state = _restore(tmp_path / "checkpoints", now.model, trainer.state_shapes)
  name = "stack.scanned_layers.0.mixer.q_proj.kernel"
  assert tuple(state.params[name].sharding.spec)[:2] == (None, "fsdp")
  for leaf, shape in zip(
      jax.tree.leaves(state), jax.tree.leaves(trainer.state_shapes), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert leaf.sharding.memory_kind == shape.sharding.memory_kind
  assert_same_bits(
      by_layer(now.model, jax.device_get(state)), by_layer(before.model, jax.device_get(saved))
  )


@pytest.mark.slow
def test_a_checkpoint_has_an_entry_for_each_layer(begun):
  folder, layers, _ = begun
  metadata = json.loads((folder / "1" / "params" / "_METADATA").read_text())
  kept = {leaf["key_metadata"][0]["key"] for leaf in metadata["tree_metadata"].values()}
  assert kept == set(layers.params)
  assert {f"layers.{layer}.norm.scale" for layer in range(LAYERS)} < kept
