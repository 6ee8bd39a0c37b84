"""Command lines in hostile surroundings: no streams, foreign folders, damaged files."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest
from etils import epath

from dense_jax import experiment
from dense_jax.cli import common, train
from dense_jax.config import ExperimentConfig, ModelConfig, defaults
from dense_jax.errors import InputError
from dense_jax.interrupt import Interrupt, Stopped
from dense_jax.training import lock
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.checkpoint_reader import CheckpointReader
from dense_jax.training.metrics import MetricsWriter
from dense_jax.training.step import TrainState
from dense_jax.training.stored import saved_steps
from tests.cli.test_train import ENVIRONMENT, TRAIN, arguments, run
from tests.helpers import ROOT, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


MODEL = ModelConfig()  # The states of these checkpoints have no layers.
# One step more than the experiment has, and no other learning rate.
LONGER = ["--config.train.steps=5", "--config.optimizer.schedule_steps=4"]


def in_shell(redirections, module, *more):
  """Runs a command line with a shell's redirections; returns status, stdout and stderr."""
  command = f'exec "$0" -m {module} "$@" {redirections}'
  done = subprocess.run(
      ["bash", "-c", command, sys.executable, *map(str, more)], cwd=ROOT,
      env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_run_without_streams_trains_and_writes_only_what_it_means(text, tmp_path, closed):
  workdir = tmp_path / "run"
  status, out, err = in_shell(closed, TRAIN, *arguments(text, workdir))
  assert (status, err) == (0, "")
  assert bool(out) == (closed == "2>&-")
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert {line["step"] for line in lines} == {1, 2, 3, 4}
  json.loads((workdir / "config.json").read_text())


@pytest.mark.parametrize("lost", ["2>/dev/full", "2>&1 | true"])
def test_bad_input_is_status_2_where_nobody_can_read_why(text, tmp_path, lost):
  command = f"{lost}; exit ${{PIPESTATUS[0]}}"
  done = subprocess.run(
      ["bash", "-c", f'"$0" -m {TRAIN} "$@" {command}', sys.executable,
       *map(str, arguments(text, tmp_path / "run", "--config.train.steps=0"))],
      cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300,
  )
  assert done.returncode == 2


def test_a_full_disk_behind_the_output_is_called_so(text, tmp_path):
  status, _, err = in_shell(">/dev/full", TRAIN, *arguments(text, tmp_path / "run"))
  assert status == 1
  assert err.strip() == (
      "output that cannot be written (No space left on device): nothing was saved; the same "
      "command begins again"
  )


def test_a_long_lock_is_taken_over_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "_SILENT_SECONDS", 0.1)
  (tmp_path / "lock.json").write_bytes(b'{"host": "' + b"y" * 100_000 + b'"}')
  held = lock.RunLock(tmp_path, lambda said: None)
  try:
    held.check()  # Reads the lock as its own.
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
  finally:
    held.release()
  assert not list(tmp_path.iterdir())


def test_a_lock_that_is_no_file_is_named(text, tmp_path):
  (tmp_path / "lock.json").mkdir()
  with pytest.raises(InputError, match=r"--workdir = .*lock\.json: Is a directory"):
    train.main(list(map(str, arguments(text, tmp_path))))


@pytest.mark.parametrize(("part", "key", "value", "message"), [
    ("model", "family", None, "config.model.family = None is not valid: expected one of"),
    ("model", "family", ["mamba"], r"config.model.family = \['mamba'\] is not valid"),
    ("optimizer", "learning_rate", 10**400, "expected a value of type float"),
    ("data", "cache_dir", "a\0b", "it has a null character"),
])
def test_a_damaged_configuration_is_named(tmp_path, part, key, value, message):
  values = defaults(ExperimentConfig())
  values[part][key] = value
  (tmp_path / "config.json").write_text(json.dumps(values))
  with pytest.raises(InputError, match=f"config.json cannot be read .*{message}"):
    experiment.read(epath.Path(tmp_path))


def test_a_request_that_a_callback_swallowed_is_obeyed_at_the_next_stage():
  interrupt = Interrupt()
  with pytest.raises(Stopped, match="SIGTERM: nothing is saved"):
    try:
      interrupt.obey(lambda: "nothing is saved")
      interrupt.ask("SIGTERM")
    except Stopped:  # As a library's destructor does.
      interrupt.ask("SIGTERM")  # Not again in what cleans up.
    interrupt.wait(lambda: "nothing is saved")


@pytest.mark.parametrize(("error", "is_said"), [
    (Stopped("SIGTERM: nothing is saved"), False),
    (RuntimeError("Event loop is closed"), False),
    (ValueError("anything else"), True),
])
def test_errors_in_callbacks_that_are_told_elsewhere_are_not_said(
    capsys, monkeypatch, error, is_said
):
  class Raises:
    def __del__(self):
      raise error

  monkeypatch.setattr(sys, "unraisablehook", common._say_unraisable)
  Raises()
  assert bool(capsys.readouterr().err) == is_said


def test_a_model_of_another_program_is_not_taken_for_a_run(text, tmp_path):
  config = '{"model_type": "mamba", "hidden_size": 64}'
  (tmp_path / "config.json").write_text(config)
  (tmp_path / "model.safetensors").write_bytes(b"weights")
  with pytest.raises(InputError, match=r"--workdir = .*; it holds config\.json"):
    train.main(list(map(str, arguments(text, tmp_path))))
  assert (tmp_path / "config.json").read_text() == config


@pytest.mark.parametrize(("name", "kind"), [
    ("metrics.jsonl", "file"), ("data.json", "file"), ("loss.png", "file"),
    ("report.md", "file"),
    ("tensorboard", "folder"), ("tokenizer", "folder"), ("checkpoints", "folder"),
])
def test_parts_of_a_run_that_cannot_be_written_are_named(text, tmp_path, name, kind):
  experiment.save(ExperimentConfig(), epath.Path(tmp_path))
  (tmp_path / name).mkdir() if kind == "file" else (tmp_path / name).write_text("")
  with pytest.raises(InputError, match=f"a folder whose {name} is a {kind}"):
    train.main(list(map(str, arguments(text, tmp_path))))


@pytest.mark.parametrize("name", ["x" * 256, "/".join(["y" * 200] * 25), "gs:/bucket"])
def test_a_workdir_that_cannot_be_made_is_named(text, tmp_path, name, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match="--workdir"):
    train.main(["--config", f"{ROOT}/experiments/smoke.py:debug", "--workdir", name])
  assert not list(tmp_path.iterdir())


def full_disk():
  try:
    raise OSError(errno.ENOSPC, "No space left on device", "/run/metrics.jsonl")
  except OSError as error:
    raise RuntimeError("while writing") from error


def full_disk_below_orbax():
  raise ValueError(
      'RESOURCE_EXHAUSTED: Error writing local file "/run/checkpoints/5": Failed to write 9 bytes '
      "to file 18: No space left on device [os_error_code='28'] [source locations='x.cc:1']"
  )


@pytest.mark.parametrize(("raises", "file"), [
    (full_disk, "/run/metrics.jsonl"), (full_disk_below_orbax, "/run/checkpoints/5"),
])
def test_a_full_disk_is_a_sentence_and_no_reason_to_try_again(raises, file):
  status, said = common._outcome(lambda arguments: raises())
  assert status == 2
  assert said == (
      f"error: No space left on device: {file}. The same command goes on, or begins again, once "
      "that is mended"
  )


def test_other_errors_keep_their_traceback_and_status_1():
  status, said = common._outcome(lambda arguments: [][0])
  assert status == 1
  assert "IndexError" in said


@pytest.mark.parametrize("damaged", [
    b"", b'{"heldout', b"\xff\xfe\x84", b"[]", b'{"heldout_loss": "low"}', b'{"other": 1}'
])
def test_an_unreadable_heldout_loss_ranks_nothing_and_keeps_nothing_from_being_read(
    tmp_path, damaged
):
  folder = epath.Path(tmp_path)
  checkpoints = Checkpoints(folder, MODEL, keep_last=1, keep_best=1)
  for step, loss in ((1, 2.0), (2, 3.0)):
    params = {"w": jnp.full((2,), step, jnp.float32)}
    checkpoints.save(TrainState(jnp.int32(step), params, {}), step, {}, loss)
  checkpoints.close()
  [file] = folder.glob("2/metrics/metrics")
  file.write_bytes(damaged)
  checkpoints = CheckpointReader(folder, MODEL)
  for which, step in (("latest", 2), ("best", 1), ("2", 2)):
    found, params, _ = checkpoints.restore_params(params, which)
    assert (found, params["w"].tolist()) == (step, [step, step])
  # The next run goes on beside it.
  checkpoints = Checkpoints(folder, MODEL, keep_last=1, keep_best=1)
  checkpoints.save(TrainState(jnp.int32(3), params, {}), 3, {}, 4.0)
  checkpoints.close()
  assert saved_steps(folder) == [1, 3]


@pytest.fixture(scope="module")
def whole_run(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  assert run(TRAIN, *arguments(text, workdir))[0] == 0
  return workdir


def contents(folder):
  return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("change", "message"), [
    (["--config.train.batch_size=4"], "config.train.batch_size = 4 is not valid: expected 2, with"),
    (["--config.seed=5"], "config.seed = 5 is not valid: expected 0, with which the run began"),
    (["--config.train.steps=3"], "config.train.steps = 3 is not valid: expected an integer >= 4"),
    (["--config.mesh.data=2"], "config.mesh"),
])
def test_a_refused_resume_changes_nothing(text, whole_run, change, message):
  before = contents(whole_run)
  with pytest.raises(InputError, match=re.escape(message)):
    train.main(list(map(str, arguments(text, whole_run, *change))))
  assert contents(whole_run) == before


@pytest.mark.slow
def test_other_data_do_not_take_the_place_of_a_damaged_description(text, whole_run, tmp_path):
  workdir, other = tmp_path / "run", tmp_path / "text"
  shutil.copytree(whole_run, workdir)
  shutil.copytree(text, other)
  (other / "1.txt").write_text("something else\n" * 99)
  (workdir / "data.json").write_text('{"finger')
  before = contents(workdir)
  status, _, err = run(TRAIN, *arguments(other, workdir, *LONGER))
  assert status == 2
  assert re.search(r"config\.data = .* is not valid: expected the same text", err)
  assert contents(workdir) == before
  # The right data heal it.
  status, _, err = run(TRAIN, *arguments(text, workdir, *LONGER))
  assert status == 0, err
  assert json.loads((workdir / "data.json").read_text()).keys() >= {"fingerprint", "files"}


def test_a_reader_that_is_slower_than_the_writer_takes_what_is_there_then(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path)
  params = {"w": jnp.zeros(2)}
  writer = Checkpoints(folder, MODEL, keep_last=1, keep_best=0)

  def save(step):
    writer.save(TrainState(jnp.int32(step), params, {}), step, {}, None)
    writer.wait()

  save(1)
  reader = CheckpointReader(folder, MODEL)
  read, tried = reader._read, []

  def read_late(step, arguments):
    tried.append(step)
    if step < 4:
      save(step + 1)  # Which deletes the one that is about to be read.
    return read(step, arguments)

  monkeypatch.setattr(reader, "_read", read_late)
  assert reader.restore_params(params, "latest")[0] == 4
  assert tried == [1, 2, 3, 4]
  writer.close()


@pytest.mark.parametrize(("rest", "is_kept"), [
    (b"\0" * 4096, True), (b"<html>", True), (b'{"step": 3, "lo', False), (b'{"step": 3}', False),
    (b"", False),
])
def test_what_ends_a_metrics_file_is_kept_unless_a_kill_left_it(tmp_path, rest, is_kept):
  file = tmp_path / "metrics.jsonl"
  content = b'{"step": 2, "loss": 3.5}\n' + rest
  file.write_bytes(content)
  MetricsWriter(epath.Path(tmp_path), 2).close()
  assert file.read_bytes() == b'{"step": 2, "loss": 3.5}\n'
  beside = tmp_path / "metrics.jsonl.damaged-1"
  assert (beside.read_bytes() == content) if is_kept else not beside.exists()
