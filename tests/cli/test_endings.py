"""A run that is ended at any moment, in any way, resumes or begins again by the same command."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dense_jax.cli import train
from dense_jax.errors import InputError
from tests.cli.test_train import ENVIRONMENT, TRAIN, arguments, run, start, training_losses
from tests.helpers import ROOT, write_text

# Moment -> the file in the run's folder that exists from then on; "" means the process's start.
MOMENTS = {
    "begin": "", "lock": "lock.json", "config": "config.json", "folder": "checkpoints",
    "first step": "metrics.jsonl", "first save": "checkpoints/*.orbax-checkpoint-tmp*",
    "later": "checkpoints/8", "end": "checkpoints/12",
}
MORE = ["--config.train.steps=12", "--config.train.checkpoint_every=2",
        "--config.train.keep_best=0", "--config.train.eval_every=12"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  status, _, err = run(TRAIN, *arguments(text, workdir, *MORE))
  assert status == 0, err
  return training_losses(workdir)


def at(moment, process, workdir):
  """Waits until the moment has come, or the process has ended."""
  pattern = MOMENTS[moment]
  while process.poll() is None and pattern and not list(workdir.glob(pattern)):
    time.sleep(0.002)


def goes_on(text, workdir, unbroken):
  """Checks that the same command finishes the run, with the losses of a run without a break."""
  status, out, err = run(TRAIN, *arguments(text, workdir, *MORE))
  assert status == 0, err
  assert training_losses(workdir) == unbroken
  return out


@pytest.mark.parametrize("moment", [
    pytest.param(moment, marks=pytest.mark.slow if moment == "first save" else
                 pytest.mark.exhaustive)
    for moment in MOMENTS
])
def test_killed_at_any_moment(text, tmp_path, unbroken, moment):
  workdir = tmp_path / "run"
  process = start(TRAIN, *arguments(text, workdir, *MORE))
  at(moment, process, workdir)
  process.kill()
  process.communicate(timeout=60)
  goes_on(text, workdir, unbroken)


@pytest.mark.parametrize(("name", "moment", "twice"), [
    pytest.param("TERM", "first save", False, marks=pytest.mark.slow),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
        ("QUIT", "later", False), ("INT", "later", True),
        ("INT", "begin", False), ("TERM", "first step", True),
        ("HUP", "config", False), ("TERM", "end", False), ("TERM", "lock", False),
        ("TERM", "folder", False), ("INT", "first step", False),
        ("TERM", "config", True), ("USR1", "first save", True), ("HUP", "end", True),
    )),
])
def test_a_signal_at_any_moment_ends_with_a_true_sentence(
    text, tmp_path, unbroken, name, moment, twice
):
  workdir = tmp_path / "run"
  process = start(TRAIN, *arguments(text, workdir, *MORE))
  if moment == "begin":
    time.sleep(0.3)  # Python itself has begun.
  at(moment, process, workdir)
  process.send_signal(getattr(signal, f"SIG{name}"))
  if twice:
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=30)
  assert "Traceback" not in out + err
  assert process.returncode in (0, 1)
  if process.returncode:
    assert f"SIG{name}: " in out + err
  out_again = goes_on(text, workdir, unbroken)
  ((begun, done),) = re.findall(r"from step (\d+) to 12|all (12) steps are done", out_again)
  begun = begun or done
  for saved in re.findall(r"saved step (\d+)|step (\d+) is saved", out + err):
    assert begun in saved
  if "nothing was saved" in out + err:
    assert begun == "0"


@pytest.mark.slow
@pytest.mark.parametrize("closed", [
    pytest.param("stdout", marks=pytest.mark.exhaustive), "both",
])
def test_a_closed_output_saves(text, tmp_path, unbroken, closed):
  workdir = tmp_path / "run"
  merged = subprocess.STDOUT if closed == "both" else subprocess.PIPE
  process = subprocess.Popen(
      [sys.executable, "-m", TRAIN, *map(str, arguments(text, workdir, *MORE))], cwd=ROOT,
      env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=merged, text=True,
  )
  for line in process.stdout:
    if line.startswith("step 1/"):
      break
  process.stdout.close()
  if closed == "stdout":
    assert "Traceback" not in process.stderr.read()
  assert process.wait(timeout=60) in (0, 1)  # It may have been done by then.
  assert list((workdir / "checkpoints").iterdir())
  goes_on(text, workdir, unbroken)


@pytest.mark.slow
def test_a_second_run_is_refused_and_the_first_goes_on(text, tmp_path, unbroken):
  workdir = tmp_path / "run"
  first = start(TRAIN, *arguments(text, workdir, *MORE))
  at("config", first, workdir)
  status, _, err = run(TRAIN, *arguments(text, workdir, *MORE))
  assert status == 2
  assert f"this one is used by process {first.pid} on" in err
  _, err = first.communicate(timeout=120)
  assert first.returncode == 0, err
  assert training_losses(workdir) == unbroken
  assert not (workdir / "lock.json").exists()


@pytest.mark.slow
def test_a_folder_that_is_removed_stops_training(text, tmp_path):
  workdir = tmp_path / "run"
  process = start(TRAIN, *arguments(text, workdir, "--config.train.steps=100000"))
  at("first step", process, workdir)
  workdir.rename(tmp_path / "aside")
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2
  assert re.search(r"error: --workdir = .* is gone while the run writes into it", err)


# A learning rate of 1e3 gives NaN within a few steps; the step that shows it is no matter.
DIVERGES = ["--config.optimizer.learning_rate=1e3", "--config.train.keep_last=1",
            "--allow-change=optimizer.learning_rate,train.steps"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("guard", "ends_with"), [
    pytest.param(["skip=none"], 2, id="without a guard"),
    pytest.param(["in_a_row=2", "returns=1"], 3, id="with a guard"),
])
def test_numbers_that_are_not_finite_stop_training_and_cost_nothing(
    text, tmp_path, guard, ends_with
):
  workdir = tmp_path / "run"
  guarded = [f"--config.guard.{key}" for key in guard]
  status, _, err = run(TRAIN, *arguments(text, workdir, "--config.train.steps=2", *guarded))
  assert status == 0, err
  status, _, err = run(
      TRAIN, *arguments(text, workdir, "--config.train.steps=12", *DIVERGES, *guarded)
  )
  assert status == ends_with, err
  assert "not finite" in err and "config.optimizer.learning_rate" in err
  assert "Traceback" not in err
  saved = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
  assert 2 in saved
  for which in ("latest", "best"):
    status, out, err = run("dense_jax.cli.evaluate", "--workdir", workdir, "--checkpoint", which)
    assert status == 0, err
    assert re.search(r"held-out loss \d", out)


@pytest.mark.parametrize("key", [
    "train.batch_size=10000000", "model.width=1000000000", "model.vocab_size=2000000000",
    "model.mixer.expand=2000000000", "model.mixer.state_size=1000000000", "model.layers=65536",
    "data.seq_len=2000000000", f"seed={2**32}", f"train.steps={10**30}", f"model.width={10**18}",
])
def test_integers_of_any_size_are_refused_before_anything_is_allocated(text, tmp_path, key):
  wide = ["--config.model.width=4000000"] if key.startswith("model.layers") else []
  with pytest.raises(InputError, match=re.escape(f"config.{key.partition('=')[0]}")):
    train.main(list(map(str, arguments(text, tmp_path / "run", f"--config.{key}", *wide))))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_may_be_in_its_first_second(text, tmp_path):
  """A kill in the first second may leave the lock, or half a file."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "lock.json").write_text(json.dumps({"host": "other", "pid": 1, "token": "x"}))
  os.utime(workdir / "lock.json", (1e9, 1e9))
  (workdir / ".config.json.0123.partial").write_text('{"mod')
  status, out, err = run(TRAIN, *arguments(text, workdir))
  assert status == 0, err
  assert "took over the lock" in out
  assert not list(workdir.glob(".*"))
