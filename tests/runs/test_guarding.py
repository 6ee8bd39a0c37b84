"""Runs whose numbers go wrong: what is skipped, where they go back to, how they stop."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dense_jax import runs
from dense_jax.errors import DivergedError, InputError
from dense_jax.training.events import read_events
from dense_jax.training.loop import Hook
from dense_jax.training.stored import saved_steps
from tests import faulty
from tests.builders import COMPILER_OPTIONS
from tests.helpers import tiny_experiment, write_text

STEPS = 10


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(text):
  """Returns ten steps with a checkpoint after every fourth; three skipped in a row lead back."""
  return tiny_experiment(text, [
      ("model.layers", "2"), ("model.dense.depth", "0"),
      ("train.steps", str(STEPS)), ("train.checkpoint_every", "4"), ("train.log_every", "1"),
      ("train.eval_every", "100"), ("train.keep_best", "0"), ("optimizer.schedule_steps", "10"),
      ("guard.in_a_row", "3"), ("guard.returns", "2"),
  ])


@pytest.fixture(autouse=True)
def compiles_fast(monkeypatch):
  monkeypatch.setattr("dense_jax.ops.resolver.training_options", lambda: COMPILER_OPTIONS)


def changed(config, **groups):
  return dataclasses.replace(config, **{
      group: dataclasses.replace(getattr(config, group), **values)
      for group, values in groups.items()
  })


def params(workdir, checkpoint="latest"):
  run = runs.restore(workdir, checkpoint, runs_model=False)
  return {name: np.asarray(leaf).tobytes() for name, leaf in run.params.items()}


def column(workdir, name):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line[name] for line in lines if name in line}


def kinds(workdir):
  return [event.kind for event in read_events(epath.Path(workdir))]


def fail(moment):
  raise RuntimeError("a fault")


def passes_over(config, workdir, batches, *spans):
  """Begins a run in a folder, and says there that it has passed over these spans."""
  with pytest.raises(RuntimeError, match="a fault"):
    runs.train_run(config, workdir, hooks=[Hook(1, fail)])
  content = {"batches": batches, "spans": spans, "step": 0, "returns": 0}
  (workdir / "passed_over.json").write_text(json.dumps(content))


def identity(workdir):
  """Returns what identifies a run's batches, as its last checkpoint has it."""
  file = max((workdir / "checkpoints").iterdir(), key=lambda save: int(save.name))
  position = json.loads((file / "data" / "metadata").read_text())
  return {name: value for name, value in position.items()
          if name not in ("step", "guard", "passed_over")}


@pytest.mark.slow
def test_a_skipped_batch_leaves_the_run_that_never_saw_it(config, tmp_path, monkeypatch, capsys):
  faulty.install(monkeypatch, {2: "nan", 5: "inf gradient"})
  result = runs.train_run(config, tmp_path / "run")
  assert result.metrics["skipped_steps"] == 2 and result.metrics["skipped_in_a_row"] == 0
  assert [step for step, loss in column(tmp_path / "run", "loss").items() if np.isnan(loss)] == [3]
  said = "step 3  skipped 1 of the last steps, 1 in a row by now (loss nan, gradient norm nan)"
  assert said in capsys.readouterr().out
  assert kinds(tmp_path / "run").count("skipped") == 2
  rates = column(tmp_path / "run", "learning_rate")
  assert rates[4] == rates[3] and rates[7] == rates[6]  # The schedule stands still.
  # The same updates, from batches 0, 1, 3, 4, 6, 7, 8, 9.
  shorter = changed(config, train={"steps": 8})
  passes_over(shorter, tmp_path / "without", identity(tmp_path / "run"), (2, 3), (5, 6))
  runs.train_run(shorter, tmp_path / "without")
  assert params(tmp_path / "without") == params(tmp_path / "run")


@pytest.mark.slow
def test_it_goes_back_and_ends_as_a_run_that_passed_over_the_window(
    config, tmp_path, monkeypatch, capsys
):
  faulty.install(monkeypatch, {5: "nan", 6: "nan", 7: "nan"})
  workdir = tmp_path / "run"
  result = runs.train_run(config, workdir)
  assert result.step == STEPS and result.metrics["skipped_steps"] == 0
  out = capsys.readouterr().out
  assert ("steps 6 to 8 were skipped one after the other: back to step 4, and batches 4 to 7 are "
          "passed over (return 1 of at most 2 to this step)") in out
  assert json.loads((workdir / "passed_over.json").read_text())["spans"] == [[4, 8]]
  assert list(column(workdir, "loss")) == list(range(1, STEPS + 1))
  assert kinds(workdir).count("returned") == 1
  # A run of the same folder, anew: the file alone says what is passed over.
  passes_over(config, tmp_path / "without", identity(workdir), (4, 8))
  runs.train_run(config, tmp_path / "without")
  assert params(tmp_path / "without") == params(workdir)
  assert column(tmp_path / "without", "loss") == column(workdir, "loss")


@pytest.mark.exhaustive
def test_the_course_does_not_depend_on_how_often_the_host_looks(config, tmp_path, monkeypatch):
  faulty.install(monkeypatch, {4: "nan", 5: "nan", 6: "nan"})
  seldom = changed(config, train={"log_every": 10, "checkpoint_every": 4})
  runs.train_run(config, tmp_path / "often")
  runs.train_run(seldom, tmp_path / "seldom")
  spans = [json.loads((tmp_path / name / "passed_over.json").read_text())["spans"]
           for name in ("often", "seldom")]
  assert spans[0] == spans[1]
  assert params(tmp_path / "often") == params(tmp_path / "seldom")


@pytest.mark.exhaustive
def test_a_kill_after_the_return_changes_nothing(config, tmp_path, monkeypatch):
  faulty.install(monkeypatch, {5: "nan", 6: "nan", 7: "nan"})
  runs.train_run(config, tmp_path / "whole")
  steps = []

  def fail_later(moment):
    steps.append(moment.step)
    if steps.count(5) == 2:  # After the return, before the next checkpoint.
      fail(moment)

  with pytest.raises(RuntimeError, match="a fault"):
    runs.train_run(config, tmp_path / "run", hooks=[Hook(1, fail_later)])
  assert saved_steps(epath.Path(tmp_path / "run" / "checkpoints"))[-1] == 4
  runs.train_run(config, tmp_path / "run")
  assert params(tmp_path / "run") == params(tmp_path / "whole")
  assert column(tmp_path / "run", "loss") == column(tmp_path / "whole", "loss")


@pytest.mark.exhaustive
def test_before_the_first_checkpoint_it_begins_again(config, tmp_path, monkeypatch):
  faulty.install(monkeypatch, {0: "nan", 1: "nan", 2: "nan"})
  runs.train_run(config, tmp_path / "run")
  assert json.loads((tmp_path / "run" / "passed_over.json").read_text())["spans"] == [[0, 3]]
  assert not any(verdict.damage for verdict in runs.verify(tmp_path / "run"))
  passes_over(config, tmp_path / "without", identity(tmp_path / "run"), (0, 3))
  runs.train_run(config, tmp_path / "without")
  assert params(tmp_path / "without") == params(tmp_path / "run")
  # Another run that begins in the folder before its first checkpoint has batches of its own.
  for number, other in enumerate([
      dataclasses.replace(config, seed=5), changed(config, optimizer={"learning_rate": 0.1})
  ]):
    folder = tmp_path / f"abandoned{number}"
    folder.mkdir()
    for name in ("config.json", "data.json", "passed_over.json"):
      shutil.copy(tmp_path / "run" / name, folder)
    monkeypatch.undo()
    runs.train_run(other, folder)
    runs.train_run(other, tmp_path / f"fresh{number}")
    assert params(folder) == params(tmp_path / f"fresh{number}")
    assert not (folder / "passed_over.json").exists()


@pytest.mark.exhaustive
def test_no_checkpoint_is_made_of_a_state_that_is_just_skipping(config, tmp_path, monkeypatch):
  faulty.install(monkeypatch, {6: "nan", 7: "nan", 8: "nan"})
  runs.train_run(config, tmp_path / "run")
  spans = json.loads((tmp_path / "run" / "passed_over.json").read_text())["spans"]
  assert spans == [[4, 9]]  # Not from step 8 on.


@pytest.mark.slow
def test_after_so_many_returns_it_stops_and_says_where(config, tmp_path, monkeypatch, capsys):
  faulty.install(monkeypatch, {number: "nan" for number in range(5, 40)})
  workdir = tmp_path / "run"
  with pytest.raises(DivergedError, match="after 3 skipped steps in a row, and 2 returns to step"):
    runs.train_run(config, workdir)
  passed_over = json.loads((workdir / "passed_over.json").read_text())
  assert passed_over.pop("course")
  assert passed_over == {
      "batches": identity(workdir), "spans": [[4, 11]], "step": 0, "returns": 0
  }
  found = json.loads((workdir / "diagnosis.json").read_text())
  assert (found["step"], found["batch"], found["loss"]) == (4, 11, None)
  assert len(found["activations"]) == len(found["gradients"]) == 2
  assert all(figures["residual_rms"] > 0 for figures in found["activations"])
  assert found["first"] == "the loss, although the activations of all layers are finite"
  assert "layer  activations (rms)" in capsys.readouterr().out
  assert kinds(workdir)[-1] == "stopped" and kinds(workdir).count("returned") == 2
  assert not (workdir / "lock.json").exists()
  # A person who starts it again has two returns again.
  with pytest.raises(DivergedError):
    runs.train_run(config, workdir)
  assert kinds(workdir).count("returned") == 4


@pytest.mark.slow
def test_the_first_layer_whose_numbers_go_wrong_is_named(config, tmp_path):
  """Nothing is injected: a parameter of the second layer is infinite."""
  workdir = tmp_path / "run"
  quick = changed(config, guard={"returns": 0})

  def spoil(moment):
    if moment.step == 5:
      name = "stack.scanned_layers.0.mixer.out_proj.kernel"  # Of both layers.
      leaf = moment.state.params[name]
      moment.state.params[name] = jax.device_put(leaf.at[1].set(jnp.inf), leaf.sharding)

  with pytest.raises(DivergedError, match=r"not finite first: the activations of layer 1 \("):
    runs.train_run(quick, workdir, hooks=[Hook(1, spoil)])
  found = json.loads((workdir / "diagnosis.json").read_text())
  assert found["first"].startswith("the activations of layer 1 (")
  assert found["activations"][0]["residual_rms"] > 0
  assert found["activations"][1]["residual_rms"] is None


@pytest.mark.slow
def test_a_spike_is_skipped_and_a_resumed_run_decides_alike(config, tmp_path, monkeypatch):
  guard = {"skip": "spikes", "window": 8, "sigmas": 20.0}
  config = changed(config, guard=guard, train={"steps": 16, "checkpoint_every": 5})
  faulty.install(monkeypatch, {12: "spike"})
  runs.train_run(config, tmp_path / "whole")
  assert column(tmp_path / "whole", "skipped_steps")[13] == 1
  assert column(tmp_path / "whole", "skipped_steps")[12] == 0

  with pytest.raises(RuntimeError, match="a fault"):
    runs.train_run(config, tmp_path / "run", hooks=[Hook(11, fail)])
  runs.train_run(config, tmp_path / "run")
  assert params(tmp_path / "run") == params(tmp_path / "whole")
  assert column(tmp_path / "run", "skipped_steps") == column(tmp_path / "whole", "skipped_steps")


def test_a_damaged_record_of_what_was_passed_over_is_named(config, tmp_path):
  passes_over(config, tmp_path / "run", {}, "x")
  with pytest.raises(InputError, match=r"passed_over\.json is not valid: expected what a run"):
    runs.train_run(config, tmp_path / "run")
