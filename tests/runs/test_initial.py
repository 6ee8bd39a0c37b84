"""Runs that begin with another model: its loss, its tokenizer, and going on without it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from dense_jax import runs
from dense_jax.config import MeshConfig
from dense_jax.errors import InputError
from dense_jax.models.params import abstract_model, by_layer, get_params
from dense_jax.runs.initial import beginning, find_source
from dense_jax.sharding import make_mesh
from dense_jax.training.step import Trainer
from tests.builders import random_params
from tests.helpers import tiny_experiment, write_text
from tests.runs.test_publishing import make_workdir
from tests.runs.test_training import changed, column

MORE = {"depth": 2, "gate_sharing": "per_source"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(text):
  """Two steps of smoke:debug of a family that compiles fast, m = 1, with an average."""
  return tiny_experiment(text, [
      ("train.steps", "2"), ("train.ema", "0.5"),
  ])


@pytest.fixture(scope="module")
def source(config, tmp_path_factory):
  """A run of m = 1 with random parameters, and others as their average."""
  assert config.model.dense.depth == 1
  model = dataclasses.replace(config.model, vocab_size=258)
  folder = tmp_path_factory.mktemp("source") / "m1"
  return make_workdir(folder, model, seeds=(0, 1), ema=0.5, make_params=usual_params)


def usual_params(model, seed):
  """Random parameters whose losses are about those of a fresh model."""
  params = random_params(model, seed)
  return params | {"embedding": 0.02 * params["embedding"]}


@pytest.fixture(scope="module")
def wider(config):
  """The configuration of m = 2."""
  dense = dataclasses.replace(config.model.dense, **MORE)
  return changed(config, model={"dense": dense})


@pytest.fixture(scope="module")
def warm(source, wider, tmp_path_factory):
  """A run of m = 2 that began with the newest raw parameters of the run of m = 1."""
  folder = tmp_path_factory.mktemp("warm") / "m2"
  runs.train_run(wider, folder, init_from=runs.InitFrom(source, weights="raw"))
  return folder


@pytest.mark.slow
def test_the_loss_of_the_first_step_is_that_of_the_model_it_began_with(
    source, config, wider, warm, tmp_path
):
  same = tmp_path / "m1"
  runs.train_run(
      changed(config, train={"steps": 1}), same, init_from=runs.InitFrom(source, weights="raw"))
  # A step's loss is that of the parameters before its update.
  assert column(warm, "loss")[1] == pytest.approx(column(same, "loss")[1], rel=0, abs=1e-6)
  before, now = column(same, "heldout_loss"), column(warm, "heldout_loss")
  assert now[0] == pytest.approx(before[0], rel=0, abs=1e-6)
  assert now[2] != now[0]
  record = json.loads((warm / "init.json").read_text())
  assert record["source"] == source and record["model"] == f"step 20 of {source}"
  assert record["new"] > 0 and record["dense"]["depth"] == 1
  run = runs.restore(warm)
  assert run.config.model.dense.depth == 2 and run.step == 2


@pytest.mark.slow
def test_it_goes_on_when_the_source_is_gone(source, wider, warm, tmp_path):
  workdir = tmp_path / "m2"
  shutil.copytree(warm, workdir)
  moved = tmp_path / "gone"
  shutil.move(source, moved)
  try:
    longer = changed(wider, train={"steps": 3}, optimizer={"schedule_steps": 2})
    result = runs.train_run(longer, workdir, init_from=runs.InitFrom(source, weights="raw"))
  finally:
    shutil.move(moved, source)
  assert result.step == 3
  # It may be left out, too, and the configuration is the run's own.
  config = runs.base_config(workdir, None)
  assert config == dataclasses.replace(longer, model=result.config.model)
  assert json.loads((workdir / "init.json").read_text())["source"] == source


def test_a_run_that_began_otherwise_is_not_begun_again(source, tmp_path, monkeypatch):
  with pytest.raises(InputError, match="the run in this one began with fresh parameters"):
    beginning(epath.Path(source), runs.InitFrom("another/run"))
  workdir = epath.Path(shutil.copytree(source, tmp_path / "run"))
  record = {"source": "first/run", "model": "step 7 of first/run", "vocab_size": 260}
  (workdir / "init.json").write_text(json.dumps(record))
  with pytest.raises(InputError, match=r"expected first/run or no value, .* began with step 7"):
    beginning(workdir, runs.InitFrom("another/run"))
  monkeypatch.chdir(tmp_path)
  for init in (None, *map(runs.InitFrom, ("first/run", "./first//run", f"{tmp_path}/first/run"))):
    begun = beginning(workdir, init)
    assert (begun.source, begun.vocab_size, begun.record) == (None, 260, record)
    assert begun.tokenizer.vocab_size == 258
  monkeypatch.setenv("HOME", str(tmp_path))
  (workdir / "init.json").write_text(json.dumps(record | {"source": "~/first/run"}))
  for path in ("~/first/run", f"{tmp_path}/first/run"):
    assert beginning(workdir, runs.InitFrom(path)).source is None


def test_which_parameters_it_begins_with(source, config):
  mesh = make_mesh(config.mesh)
  model = runs.restore(source).config.model
  for weights in ("raw", "ema", "auto"):
    found = find_source(runs.InitFrom(source, "latest", weights))
    name, params = found.load(mesh)
    expected = runs.restore(source, "latest", weights)
    assert name == expected.name and ("(ema)" in name) == (weights != "raw")
    for key, value in by_layer(model, params).items():
      np.testing.assert_array_equal(value, by_layer(model, expected.params)[key])


def test_a_hugging_face_folder_on_eight_devices(source, wider, tmp_path):
  folder = str(tmp_path / "hf")
  run = runs.restore(source)
  runs.publish(run, source, folder)
  init = runs.InitFrom(folder)
  base = runs.base_config(tmp_path / "none", init)
  assert base.model == run.config.model and base.data.tokenizer == "train"
  assert base.mesh == MeshConfig()
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  found = find_source(init)
  name, params = found.load(mesh)
  assert name == folder
  model = dataclasses.replace(wider.model, vocab_size=258)
  trainer = Trainer(dataclasses.replace(wider, model=model), mesh)
  state = trainer.init_from(0, found.model, params)
  for leaf, shape in zip(
      jax.tree.leaves(state), jax.tree.leaves(trainer.state_shapes), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
  assert int(state.step) == 0
  old, new = by_layer(run.config.model, run.params), by_layer(model, state.params)
  for key, value in old.items():
    np.testing.assert_array_equal(new[key], value, err_msg=key)
  assert all(np.array_equal(state.ema[key], value) for key, value in state.params.items())
  assert get_params(abstract_model(model)).keys() == state.params.keys()


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": {"width": 24}}, r"config.model.width: it has 16, now 24\nExpected --config"),
    ({"model": {"vocab_size": 300}}, "config.model.vocab_size: it has 258, now 300"),
])
def test_another_model_is_refused_before_anything_is_written(
    source, config, tmp_path, changes, message
):
  with pytest.raises(InputError, match=message):
    runs.train_run(changed(config, **changes), tmp_path / "run", init_from=runs.InitFrom(source))
  assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(source, config, tmp_path):
  init = runs.InitFrom(source)
  with pytest.raises(InputError, match=r"config.data.tokenizer = .* expected train, which takes"):
    _with_other_tokenizer(config, tmp_path, init)


def _with_other_tokenizer(config, tmp_path, init):
  from dense_jax.data.tokenizer import train_sentencepiece

  model = tmp_path / "other.model"
  train_sentencepiece([f"def f_{i}(x): return {i * 37}\n" for i in range(300)], 320, model)
  runs.train_run(changed(config, data={"tokenizer": str(model)}), tmp_path / "run", init_from=init)


@pytest.mark.parametrize(("init", "message"), [
    (runs.InitFrom(""), "--init-from = '' is not valid"),
    (runs.InitFrom("nowhere"), "--init-from = 'nowhere' is not valid: expected a run's folder, or"),
    (runs.InitFrom("gs://bucket/run"), "--init-from = 'gs://bucket/run'"),
])
def test_a_source_that_is_not_there_is_named(init, message, monkeypatch, tmp_path):
  monkeypatch.setattr("dense_jax.files._reads_buckets", lambda: False)
  with pytest.raises(InputError, match=message):
    find_source(init)


def test_a_checkpoint_is_chosen_only_where_there_are_several(source, tmp_path):
  with pytest.raises(InputError, match=r"checkpoint '7' is not in .*: expected latest, best or"):
    find_source(runs.InitFrom(source, "7")).load(make_mesh(MeshConfig()))
  folder = str(tmp_path / "hf")
  runs.publish(runs.restore(source), source, folder)
  with pytest.raises(InputError, match=r"--init-checkpoint = 'best' .* expected no value"):
    find_source(runs.InitFrom(folder, "best"))
  with pytest.raises(InputError, match="--init-weights = 'raw' is not valid: expected no value"):
    find_source(runs.InitFrom(folder, weights="raw"))


def test_a_damaged_record_is_named(source, tmp_path):
  workdir = epath.Path(shutil.copytree(source, tmp_path / "m2"))
  for content in ("{", "[]", '{"source": 3, "vocab_size": 1}', '{"source": "x"}'):
    (workdir / "init.json").write_text(content)
    with pytest.raises(InputError, match=r"init.json cannot be read: expected what the run wrote"):
      beginning(workdir, None)


def test_without_a_run_or_a_source_an_experiment_is_needed(tmp_path):
  with pytest.raises(InputError, match="--config is missing: expected an experiment"):
    runs.base_config(tmp_path / "run", None)
