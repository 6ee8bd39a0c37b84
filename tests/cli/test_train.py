"""The command lines as a user meets them: a run, its resumption, and refusals."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dense_jax import experiment
from dense_jax.cli import train
from dense_jax.errors import InputError
from dense_jax.runs import resume
from tests.helpers import ROOT, write_text
from tests.xla_flags import FAST_TO_COMPILE

TRAIN = "dense_jax.cli.train"
SMALL = ["--config.data.tokenizer=bytes", "--config.data.seq_len=32", "--config.train.batch_size=2",
         "--config.model.width=16", "--config.model.layers=2", "--config.train.log_every=1"]


# Programs that one process compiled are read by the next ones.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_TO_COMPILE,
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax_tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def start(module, *arguments):
  """Starts a command line as its own process, on one CPU device."""
  environment = os.environ | ENVIRONMENT
  return subprocess.Popen(
      [sys.executable, "-m", module, *map(str, arguments)],
      cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )


def run(module, *arguments):
  """Runs a command line to its end; returns status, stdout and stderr."""
  process = start(module, *arguments)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


def arguments(text, workdir, *more):
  return ["--config", "experiments/smoke.py:debug", "--workdir", workdir, *SMALL,
          f"--config.data.path={text}", f"--config.data.cache_dir={text}/.cache",
          "--config.data.heldout_every=2", *more]


def training_losses(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert all("step" in line for line in lines)
  training = [line for line in lines if "loss" in line]
  assert all("tokens_per_second" in line for line in training)
  return {line["step"]: line["loss"] for line in training}


def test_whole_run_then_evaluate_and_generate(text, tmp_path):
  workdir = tmp_path / "run"
  status, out, err = run(TRAIN, *arguments(text, workdir))
  assert status == 0, err
  for part in ("devices: 1 x cpu", "mesh: one device", "states by: recurrent", "embedding",
               "tokens/s", "resume", "report", "evaluate", "sample"):
    assert part in out
  for part in ("byte bigram", "--- prompt"):  # Training ends when it ends.
    assert part not in out
  for name in ("config.json", "metrics.jsonl", "tensorboard", "checkpoints"):
    assert (workdir / name).exists()
  assert not (workdir / "loss.png").exists()
  assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))

  figures = tmp_path / "figures.json"
  status, out, err = run("dense_jax.cli.evaluate", "--workdir", workdir, "--json", figures)
  assert status == 0, err
  written = json.loads(figures.read_text())
  assert f"{written['bits_per_byte']:.3f} bits/byte" in out
  again = tmp_path / "again.json"
  status, _, err = run("dense_jax.cli.evaluate", "--workdir", workdir, "--json", again,
                       "--batch-size", 3, "--checkpoint", "best")
  assert status == 0, err
  assert json.loads(again.read_text())["loss"] == pytest.approx(written["loss"], rel=1e-6)

  status, out, err = run("dense_jax.cli.generate", "--workdir", workdir, "--prompt", "line 1",
                         "--max-new-tokens", 8, "--temperature", 0)
  assert status == 0, err
  assert out.startswith("line 1")

  status, out, err = run("dense_jax.cli.report", "--workdir", workdir)
  assert status == 0, err
  for part in ("byte bigram", "byte trigram", "xz -9", "training tokens/s", "peak memory",
               "--- prompt", "--- continuation", f"{written['bits_per_byte']:.3f}"):
    assert part in out
  assert "windows scored" not in out
  assert (workdir / "loss.png").exists()
  assert "    byte bigram" in (workdir / "report.md").read_text()


@pytest.mark.parametrize("more", [
    [], [("train.steps", "20")], [("train.steps", "20"), ("optimizer.schedule_steps", "30")],
    [("optimizer.schedule_steps", "2")], [("optimizer.schedule", "constant")],
    [("optimizer.schedule", "constant"), ("optimizer.warmup_fraction", "0")],
])
def test_the_commands_for_going_on_change_no_learning_rate(more):
  config = experiment.load("experiments/smoke.py:debug", more)
  workdir = "runs/it's mine"
  given = ["--config", "experiments/smoke.py:debug", "--workdir", workdir,
           *(f"--config.{key}={value}" for key, value in more)]
  commands = dict(
      line.split(None, 1) for line in train.next_commands(given, workdir, config).splitlines()
  )
  assert list(commands) == ["resume", "report", "evaluate", "sample"]
  words = shlex.split(commands["resume"])
  assert words[words.index("--workdir") + 1] == workdir
  overrides = [word.removeprefix("--config.").split("=") for word in words if "--config." in word]
  longer = experiment.load("experiments/smoke.py:debug", overrides)
  assert longer.train.steps == 2 * config.train.steps
  resume.check(config, longer, config.train.steps)
  # Nothing that means nothing is added.
  has_length = "constant" not in commands["resume"] or "warmup_fraction=0" not in commands["resume"]
  assert ("schedule_steps" in commands["resume"]) == has_length


SAVES_EACH_STEP = ["--config.train.steps=40", "--config.train.checkpoint_every=1",
                   "--config.train.keep_best=0", "--config.train.eval_every=40"]


@pytest.fixture(scope="module")
def losses_without_kill(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  status, _, err = run(TRAIN, *arguments(text, workdir, *SAVES_EACH_STEP))
  assert status == 0, err
  return training_losses(workdir)


@pytest.mark.slow
def test_interrupted_run_goes_on_bitwise(text, tmp_path, losses_without_kill):
  steps, parts = "--config.train.steps=40", tmp_path / "parts"
  process = start(TRAIN, *arguments(text, parts, steps))
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline:
    file = parts / "metrics.jsonl"
    if file.exists() and '"step": 3' in file.read_text():
      break
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 1, err
  assert "SIGTERM: saved step" in out
  stopped = max(training_losses(parts))
  assert 3 <= stopped < 40

  status, out, err = run(TRAIN, *arguments(text, parts, steps))
  assert status == 0, err
  assert f"from step {stopped} to 40" in out
  assert training_losses(parts) == losses_without_kill


@pytest.mark.exhaustive
@pytest.mark.parametrize("seconds", [0.0, 0.03])
def test_killed_while_saving_goes_on_bitwise(text, tmp_path, losses_without_kill, seconds):
  parts = tmp_path / "parts"
  process = start(TRAIN, *arguments(text, parts, *SAVES_EACH_STEP))
  # A checkpoint's folder, whole or not, is there from the first save on.
  while process.poll() is None and not list(parts.glob("checkpoints/*")):
    time.sleep(0.002)
  time.sleep(seconds)
  process.kill()
  process.communicate(timeout=60)
  assert process.returncode == -signal.SIGKILL

  status, _, err = run(TRAIN, *arguments(text, parts, *SAVES_EACH_STEP))
  assert status == 0, err
  assert training_losses(parts) == losses_without_kill


@pytest.mark.slow
def test_another_model_other_data_or_changed_text_is_refused(text, tmp_path):
  workdir, copy = tmp_path / "run", tmp_path / "text"
  shutil.copytree(text, copy)
  assert run(TRAIN, *arguments(copy, workdir))[0] == 0
  before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
  for change, message in (
      ("model.width=24", "config.model.width: the run has 16, now 24"),
      ("data.seq_len=16", "config.data.seq_len: the run has 32, now 16"),
  ):
    with pytest.raises(InputError, match=message):
      train.main(list(map(str, arguments(copy, workdir, f"--config.{change}"))))
  (copy / "1.txt").write_text("something else\n" * 99)
  status, _, err = run(TRAIN, *arguments(
      copy, workdir, "--config.train.steps=6", "--config.optimizer.schedule_steps=4"))
  assert status == 2
  assert "config.data" in err
  assert before == {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.modle.x=1", "unknown key config.modle; did you mean config.model?"),
        ("--config.model.dense.dept=1", "did you mean config.model.dense.depth?"),
        ("--config.train.steps=many", "expected a value of type int"),
        ("--config.train.steps=0", "expected an integer >= 1"),
        ("--config.model.dense.depth=9", "expected an integer from 0 to layers - 1"),
        ("--config.model.dense.inject=both", "expected one of state, inputs"),
        ("--config.model.family=mamab", "did you mean mamba?"),
        ("--config.mesh.tensor=3", "config.mesh"),
        ("--config.data.path=/does/not/exist", "config.data.path"),
        ("--config.model.implementation=chunked", "one of associative, pallas, triton, recurrent"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(text, tmp_path, argument, message):
  workdir = tmp_path / "run"
  with pytest.raises(InputError, match=re.escape(message)):
    train.main(list(map(str, arguments(text, workdir, "--config.train.batch_size=8", argument))))
  assert not workdir.exists()


@pytest.mark.parametrize(("argument", "message"), [
    ("--config.train.steps=0", "error: config.train.steps = 0 is not valid"),
    ("--confg=x", "unrecognized arguments"),
    ("--allow-change=model.width", "error: --allow-change = 'model.width' is not valid"),
])
def test_bad_input_is_status_2(text, tmp_path, argument, message):
  workdir = tmp_path / "run"
  status, _, err = run(TRAIN, *arguments(text, workdir, argument))
  assert status == 2
  assert message in err
  assert "Traceback" not in err
  assert not workdir.exists()


@pytest.mark.parametrize("module", [
    "train", "convert",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "report", "generate")),
])
def test_help_explains_and_is_status_0(module):
  status, out, _ = run(f"dense_jax.cli.{module}", "--help")
  assert status == 0
  assert "--workdir" in out


def test_missing_run_is_status_2(tmp_path):
  status, _, err = run("dense_jax.cli.evaluate", "--workdir", tmp_path)
  assert status == 2
  assert "expected a run with config.json" in err
