"""The average of parameters: by hand, beside training without one, saved, restored and sharded."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from dense_jax.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, TrainConfig
from dense_jax.errors import InputError
from dense_jax.sharding import make_mesh
from dense_jax.training import step as steps
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.checkpoint_reader import CheckpointReader
from dense_jax.training.step import Trainer, TrainState
from tests.builders import COMPILER_OPTIONS, model_config, packed, random_batch
from tests.helpers import TOLERANCE

T, DECAY = 8, 0.25
ROWS = [[8], [3, 5], [4, 2], [1, 7], [8], [6], [2, 6], [5, 3]]
EIGHT = MeshConfig(data=2, fsdp=4)


def config(ema=DECAY, mesh=EIGHT):
  return ExperimentConfig(
      model=model_config("gau_retnet", vocab_size=16, layers=2),
      optimizer=OptimizerConfig(learning_rate=0.1, warmup_fraction=0.0),
      data=DataConfig(seq_len=T), train=TrainConfig(batch_size=len(ROWS), loss_chunk=4, ema=ema),
      mesh=mesh,
  )


def make_trainer(settings):
  return Trainer(settings, make_mesh(settings.mesh, jax.devices()[:8]))


def run(trainer, state, seeds):
  """Returns the states after a batch of each seed, on the host, and the last on the devices."""
  after, step = [], None
  for seed in seeds:
    batch = trainer.put(jax.tree.map(np.asarray, random_batch(packed(ROWS, time=T), seed)))
    step = step or trainer.train_step.lower(state, batch).compile(
        compiler_options=COMPILER_OPTIONS)
    state, _ = step(state, batch)
    after.append(jax.device_get(state))
  return after, state


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Four steps on eight devices: folder with a checkpoint of step 2, and all states by step."""
  folder = epath.Path(tmp_path_factory.mktemp("ema") / "checkpoints")
  trainer = make_trainer(config())
  first = trainer.init(0)
  states = [jax.device_get(first)]
  after, state = run(trainer, first, (0, 1))
  checkpoints = Checkpoints(folder, config().model)
  assert checkpoints.save(state, 2, {"step": 2}, None)
  checkpoints.close()
  later, _ = run(trainer, state, (2, 3))
  return folder, [*states, *after, *later]


def test_the_average_is_what_the_formula_says(trained):
  _, states = trained
  for name, start in states[0].params.items():
    np.testing.assert_array_equal(states[0].ema[name], start)
    mean = start.astype(np.float64)
    for number, state in enumerate(states[1:], 1):
      decay = min(DECAY, (1 + number) / (10 + number))
      mean = decay * mean + (1 - decay) * state.params[name]
      np.testing.assert_allclose(state.ema[name], mean, **TOLERANCE["float32"])
      assert state.ema[name].dtype == np.float32
  # 2 / 11, 3 / 12 and so on: the decay is reached after the second update.
  assert [min(DECAY, (1 + n) / (10 + n)) for n in (1, 2, 3)] == [2 / 11, 0.25, 0.25]


def test_it_is_sharded_as_the_parameters_are():
  shapes = make_trainer(config()).state_shapes
  assert {name: leaf.sharding for name, leaf in shapes.ema.items()} == {
      name: leaf.sharding for name, leaf in shapes.params.items()}
  assert any(not leaf.sharding.is_fully_replicated for leaf in shapes.ema.values())


def test_a_run_goes_on_with_the_same_bits(trained):
  folder, states = trained
  trainer = make_trainer(config())
  checkpoints = CheckpointReader(folder, config().model)
  state, position = checkpoints.restore(trainer.state_shapes, 2)
  assert position == {"step": 2}
  after, _ = run(trainer, state, (2, 3))
  for actual, expected in zip(after, states[3:], strict=True):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_evaluation_takes_the_average_or_what_it_is_asked_for(trained):
  folder, states = trained
  shapes = make_trainer(config(mesh=MeshConfig(data=8))).state_shapes.params
  checkpoints = CheckpointReader(folder, config().model)
  for weights, expected, used in (("raw", states[2].params, "raw"), ("ema", states[2].ema, "ema"),
                                  ("auto", states[2].ema, "ema")):
    step, params, which = checkpoints.restore_params(shapes, "latest", weights)
    assert (step, which) == (2, used)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)
  assert states[2].weights is states[2].ema
  assert any(np.any(states[2].ema[name] != states[2].params[name]) for name in shapes)


@pytest.mark.slow
def test_without_it_nothing_is_there(tmp_path, monkeypatch):
  monkeypatch.setattr(steps, "_averaged", None)
  trainer = make_trainer(config(ema=0.0))
  shapes = trainer.state_shapes
  assert shapes.ema is None and shapes.weights is shapes.params
  moments = 2 * len(shapes.params) + 2  # Two counts: of Adam, and of the schedule.
  counts = 1 + len(jax.tree.leaves(shapes.guard))  # Of steps, and of skipped ones.
  assert len(jax.tree.leaves(shapes)) == counts + len(shapes.params) + moments
  trainer.train_step.lower(shapes, trainer.batch_shapes(8, T))  # Calls no `_averaged`.
  checkpoints = Checkpoints(epath.Path(tmp_path), config().model)
  assert checkpoints.save(trainer.init(0), 1, {}, None)
  checkpoints.wait()
  assert sorted(part.name for part in (tmp_path / "1").iterdir() if part.is_dir()) == [
      "data", "digests", "optimizer", "params"]
  with pytest.raises(InputError, match=r"--weights = 'ema' is not valid: expected raw or no value"):
    checkpoints.restore_params(shapes.params, "latest", "ema")
  assert checkpoints.restore_params(shapes.params, "latest", "auto")[2] == "raw"
  # Turned on, it begins with the parameters.
  state, _ = checkpoints.restore(make_trainer(config()).state_shapes, 1)
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (state.ema, state.params)))
  for name, leaf in state.ema.items():
    assert leaf.sharding.is_equivalent_to(state.params[name].sharding, leaf.ndim)
    assert leaf is not state.params[name]


def test_turned_off_it_is_gone(trained):
  folder, states = trained
  checkpoints = CheckpointReader(folder, config().model)
  state, _ = checkpoints.restore(make_trainer(config(ema=0.0)).state_shapes, 2)
  assert state.ema is None
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), states[2].params)


def test_a_damaged_average_is_refused_and_not_begun_again(trained, tmp_path):
  folder, _ = trained
  copy = epath.Path(shutil.copytree(folder, tmp_path / "copy"))
  shutil.rmtree(copy / "2" / "ema")
  checkpoints = CheckpointReader(copy, config().model)
  with pytest.raises(InputError, match=r"checkpoint 2 in .* cannot be read"):
    checkpoints.restore(make_trainer(config()).state_shapes, 2)
  with pytest.raises(InputError, match=r"checkpoint 2 in .* cannot be read"):
    checkpoints.restore_params(make_trainer(config()).state_shapes.params, "latest", "auto")


def test_an_average_that_is_not_finite_is_not_saved(tmp_path):
  one = jax.numpy.ones(3)
  state = TrainState(jax.numpy.zeros((), jax.numpy.int32), {"w": one}, {}, {"w": one * np.inf})
  checkpoints = Checkpoints(epath.Path(tmp_path), config().model)
  assert not checkpoints.save(state, 1, {}, None)
  assert checkpoints.save(dataclasses.replace(state, ema={"w": one}), 1, {}, None)
  checkpoints.close()
