"""Folders in which training may begin or resume, and refusals before any work is done."""

import dataclasses
import json
import re
import shutil

import pytest
from etils import epath

from dense_jax import experiment
from dense_jax.config import DataConfig, build
from dense_jax.data.pipeline import load_datasets
from dense_jax.errors import InputError
from dense_jax.runs import workdir
from dense_jax.training.events import record_event
from tests.helpers import write_text


@pytest.fixture
def config():
  return experiment.load("experiments/smoke.py:debug")


@pytest.fixture
def run(tmp_path, config):
  """Makes a run's folder with a checkpoint of step 4, with as much content as is checked."""
  folder = tmp_path / "run"
  (folder / "checkpoints" / "2").mkdir(parents=True)
  (folder / "checkpoints" / "4").mkdir()
  experiment.save(config, epath.Path(folder))
  return folder


def check(folder, config, allow_change=()):
  workdir.check_config(epath.Path(folder), config, allow_change)


def with_values(config, **groups):
  return dataclasses.replace(config, **{
      group: dataclasses.replace(getattr(config, group), **values)
      for group, values in groups.items()
  })


@pytest.mark.parametrize("changes", [
    {}, {"train": {"steps": 4}}, {"train": {"steps": 9}, "optimizer": {"schedule_steps": 4}},
    {"data": {"path": "elsewhere"}}, {"data": {"tokenizer": "elsewhere.model"}},
    {"model": {"remat": "full"}}, {"mesh": {"fsdp": 2}}, {"train": {"accumulate": 2}},
])
def test_a_run_goes_on_with_what_may_change(run, config, changes):
  check(run, with_values(config, **changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"train": {"steps": 3}}, "config.train.steps = 3 is not valid: expected an integer >= 4"),
    ({"optimizer": {"clip_norm": 0.0}}, "config.optimizer.clip_norm: the run has 1.0, now 0.0"),
    ({"optimizer": {"clip_norm": 0.0}, "train": {"steps": 9}}, "Add --allow-change "
     "optimizer.clip_norm,train.steps to change them"),
    ({"train": {"steps": 9}}, "config.train.steps: the run has 4, now 9"),
    ({"optimizer": {"second_moment_dtype": "bfloat16"}}, "config.optimizer.second_moment_dtype"),
    ({"optimizer": {"first_moment_dtype": "bfloat16"}}, "config.optimizer.first_moment_dtype"),
    ({"model": {"width": 24}}, "config.model.width: the run has"),
    ({"data": {"heldout_every": 7}}, "config.data.heldout_every: the run has"),
])
def test_a_run_refuses_what_it_cannot_go_on_with(run, config, changes, message):
  with pytest.raises(InputError, match=re.escape(message)):
    check(run, with_values(config, **changes))


def test_what_is_asked_for_by_name_changes_but_fewer_steps_than_done_never(run, config):
  changed = with_values(config, optimizer={"learning_rate": 0.1}, train={"steps": 3})
  with pytest.raises(InputError, match=r"config.train.steps = 3 is not valid: expected .* >= 4"):
    check(run, changed, ["train.steps", "optimizer.learning_rate"])
  check(run, with_values(changed, train={"steps": 9}), ["train.steps", "optimizer.learning_rate"])


@pytest.mark.parametrize("content", [
    "", "{", '{"model": ', "[]", "null", '{"model": []}', '{"model": {"family": []}}',
    '{"model": {"family": "none"}}', '{"train": 3}', '{"seed": "x"}', "[" * 100_000,
    '{"seed": ' + "9" * 5000 + "}", '{"unknown": 1}', "\udcff",
])
def test_a_damaged_configuration_of_a_run_is_named(run, config, content):
  (run / "config.json").write_text(content, errors="surrogateescape")
  with pytest.raises(InputError, match=r"config\.json cannot be read as a run's configuration"):
    check(run, config)


def test_checkpoints_without_a_configuration_are_no_place_to_begin(run, config):
  (run / "config.json").unlink()
  with pytest.raises(InputError, match=r"expected a run with config\.json"):
    check(run, config)


GROUPS = json.dumps({"model": {}, "data": {}, "optimizer": {}, "train": {}, "mesh": {}})


@pytest.mark.parametrize("left", [
    (), ("lock.json",), (".config.json.0123.partial", "lock.json"), (".nfs01",), ("lost+found/",),
    ("lock.json", "config.json"), ("config.json", "data.json", "metrics.jsonl", "tokenizer/"),
    ("checkpoints/",), ("checkpoints/0.orbax-checkpoint-tmp/",),
    ("config.json", "checkpoints/2.orbax-checkpoint-tmp-1/", "tensorboard/"),
])
def test_what_a_run_left_before_its_first_checkpoint_is_no_obstacle(tmp_path, config, left):
  """It is no obstacle to another configuration either, because nothing is lost."""
  folder = tmp_path / "run"
  folder.mkdir()
  for name in left:
    path = folder / name
    content = GROUPS if name == "config.json" else "{"
    path.mkdir(parents=True) if name.endswith("/") else path.write_text(content)
  check(folder, config)
  check(folder, with_values(config, model={"width": 24}))


@pytest.mark.parametrize("shown", [
    [("start", 0), ("end", 4)], [("start", 0), ("killed", 2), ("start", 2)],
])
def test_a_run_whose_checkpoints_are_missing_does_not_begin_again(run, config, shown):
  shutil.rmtree(run / "checkpoints")
  for kind, step in shown:
    record_event(epath.Path(run), step, kind, "")
  with pytest.raises(InputError, match=f"its run .* at step {shown[-1][1]}, and checkpoints has"):
    check(run, config)


@pytest.mark.parametrize(("newest", "kind", "is_refused"), [
    (9, "killed", True), (9, "interrupted", True), (8, "interrupted", False), (8, "killed", False),
    (9, "save failed", False), (9, "skipped", False),
])
def test_a_run_that_came_far_had_checkpoints_unless_its_saves_failed(
    run, config, newest, kind, is_refused
):
  shutil.rmtree(run / "checkpoints")
  (run / "checkpoints").symlink_to(run / "unmounted")
  experiment.save(with_values(config, train={"checkpoint_every": 4}), epath.Path(run))
  record_event(epath.Path(run), newest, kind, "")
  (run / "metrics.jsonl").write_text(json.dumps({"step": newest, "loss": 1.0}) + "\n")
  message = f"has trained to step {newest} with a checkpoint every 4 steps" if is_refused else (
      "a folder whose checkpoints is a folder")
  with pytest.raises(InputError, match=message):
    check(run, config)
  (run / "checkpoints").unlink()
  if not is_refused:
    check(run, config)


@pytest.mark.parametrize("left", ["thesis.tex", "checkpoints/model.pt", "metrics.jsonl", "4/"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, config, left):
  path = tmp_path / "run" / left
  path.parent.mkdir(parents=True)
  path.mkdir() if left.endswith("/") else path.touch()
  with pytest.raises(InputError, match=f"a new or empty folder.*it holds {left.partition('/')[0]}"):
    check(tmp_path / "run", config)


def test_another_programs_configuration_is_left_alone(tmp_path, config):
  (tmp_path / "config.json").write_text('{"strict": true}  // of a compiler')
  with pytest.raises(InputError, match=r"it holds config\.json"):
    check(tmp_path, config)


@pytest.fixture
def text(tmp_path):
  (tmp_path / "text").mkdir()
  return write_text(tmp_path / "text")


def load(text, cache):
  values = {"path": str(text), "tokenizer": "bytes", "heldout_every": 2, "cache_dir": str(cache)}
  return load_datasets(build(DataConfig, values))


def test_a_run_begins_with_its_configuration_and_clears_what_a_killed_one_left(
    tmp_path, text, config
):
  folder = epath.Path(tmp_path / "run")
  (folder / "tokenizer").mkdir(parents=True)
  for name in (".config.json.01.partial", "tokenizer/.tokenizer.json.02.partial", ".mine"):
    (folder / name).touch()
  workdir.begin(folder, config, load(text, tmp_path / "cache"))
  root = tmp_path / "run"
  names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))
  description = "tokenizer/tokenizer_config.json"
  assert names == [".mine", "config.json", "data.json", "tokenizer", description]
  assert experiment.read(folder) == config


def begin(folder, config, data):
  """Does what training does, which restores the checkpoint in between."""
  workdir.check_data(epath.Path(folder), data)
  workdir.begin(epath.Path(folder), config, data)


def test_data_that_moved_are_the_same_and_others_are_described(tmp_path, text, run, config):
  cache = tmp_path / "cache"
  begin(run, config, load(text, cache))  # The run has nothing to compare with yet.
  moved = text.rename(tmp_path / "moved")
  begin(run, config, load(moved, cache))
  first = sorted(moved.glob("*.txt"))[0]
  first.rename(first.with_name("0-renamed.txt"))
  begin(run, config, load(moved, cache))
  (moved / "0-renamed.txt").write_text("grown\n" * 999)
  with pytest.raises(InputError, match=r"made with other data:\n.*0-renamed\.txt has grown from"):
    begin(run, config, load(moved, cache))


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", "[" * 100_000, '{"fingerprint": 3}'])
def test_a_damaged_description_of_the_data_is_said_and_written_again(
    tmp_path, text, run, config, content, caplog
):
  (run / "data.json").write_text(content)
  begin(run, config, load(text, tmp_path / "cache"))
  assert "data.json cannot be read" in caplog.text
  assert json.loads((run / "data.json").read_text())["fingerprint"]
