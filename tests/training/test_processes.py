"""Several processes train as one does: the same losses, one stop, no half checkpoint.

Each test starts real processes with launch/local.py, eight simulated devices in all.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dense_jax.runs.recording import OF_MACHINE
from tests.helpers import ROOT, write_text

pytestmark = pytest.mark.slow

STEPS = 14
SETTINGS = [
    "--config.data.tokenizer=bytes", "--config.data.seq_len=32", "--config.data.heldout_every=2",
    # A family that compiles fast: only the first process's programs are kept.
    "--config.model.family=gau_retnet", "--config.model.width=16", "--config.model.layers=2",
    # Parameters are split over all devices, and so over all processes.
    "--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.train.batch_size=8",
    f"--config.train.steps={STEPS}", "--config.train.log_every=1", "--config.train.eval_every=7",
    "--config.train.keep_best=0", f"--config.train.checkpoint_every={STEPS}",
]
SAVES_EACH_STEP = ["--config.train.checkpoint_every=1"]
# Several processes add sums over eight devices in another order than one process.
CLOSE = {"rel": 1e-5}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


def start(
    processes, text, workdir, *more, devices=8, faults="", module="dense_jax.cli.train"
):
  """Starts the training command in several processes, with so many devices together.

  Faults are those of `tests/faulty.py`.
  """
  command = [
      sys.executable, "-m", *(["tests.faulty", faults] if faults else []),
      module, "--config", "experiments/smoke.py:debug",
      "--workdir", str(workdir), *SETTINGS, f"--config.data.path={text}",
      f"--config.data.cache_dir={text}/.cache", *more,
  ]
  return subprocess.Popen(
      [sys.executable, "launch/local.py", "--processes", str(processes),
       "--devices-per-process", str(devices // processes), "--", *command],
      cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env=os.environ | {
          "XLA_FLAGS": "--xla_backend_optimization_level=0",
          "RECORDED_ROWS": str(workdir.parent / "rows"),
          "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax_tests"),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      },
  )


def finish(process):
  """Waits; returns status, stdout and stderr."""
  try:
    out, err = process.communicate(timeout=300)
  finally:
    process.terminate()
  return process.returncode, out, err


def run(*arguments, **options):
  return finish(start(*arguments, **options))


def pids(process):
  """Returns the pids of the processes, from the launcher's first line."""
  return [int(pid) for pid in re.findall(r"process \d+ is (\d+)", process.stderr.readline())]


def lines(workdir):
  read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  learned = [
      {key: value for key, value in line.items() if key not in OF_MACHINE} for line in read
  ]
  return [line for line in learned if line.keys() != {"step"}]


def assert_same_run(workdir, expected):
  got, wanted = lines(workdir), lines(expected)
  assert [line["step"] for line in got] == [line["step"] for line in wanted]
  for line, other in zip(got, wanted, strict=True):
    assert line == pytest.approx(other, **CLOSE)


def wait_for_step(process, workdir, step):
  while process.poll() is None:
    file = workdir / "metrics.jsonl"
    if file.exists() and f'"step": {step},' in file.read_text():
      return
    time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
  """Trains the run of one process."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  status, out, err = run(1, text, workdir)
  assert status == 0, err
  assert "devices: 8 x cpu" in out
  return workdir


def test_two_processes_train_as_one(text, tmp_path, alone):
  workdir = tmp_path / "run"
  status, out, err = run(2, text, workdir)
  assert status == 0, err
  assert_same_run(workdir, alone)
  # Only the first process prints and writes.
  assert "2 processes x 4 devices: cpu | mesh: fsdp 8 |" in out
  assert out.count(f"from step 0 to {STEPS}") == out.count("\nresume ") == 1
  assert "--process-id" not in out
  assert not re.search(r"\[1\] .*(loss|step|devices)", err), err
  assert len(list((workdir / "tensorboard").iterdir())) == 1
  for name in ("config.json", "data.json", "tokenizer"):
    assert (workdir / name).exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("asked", "said"), [
    ("launcher", "SIGTERM"), ("process 1", "a signal to another process"),
])
def test_a_signal_stops_all_after_the_same_step(text, tmp_path, alone, asked, said):
  workdir = tmp_path / "run"
  process = start(2, text, workdir)
  one = pids(process)[1]
  wait_for_step(process, workdir, 3)
  os.kill(one if asked == "process 1" else process.pid, signal.SIGTERM)
  status, out, err = finish(process)
  assert status == 1, err
  (step,) = re.findall(rf"{said}: saved step (\d+) of {STEPS}", out)
  assert 3 <= int(step) < STEPS
  assert [folder.name for folder in (workdir / "checkpoints").iterdir()] == [step]

  status, out, err = run(1, text, workdir)
  assert status == 0, err
  assert f"from step {step} to {STEPS}" in out
  assert_same_run(workdir, alone)


# One process with one device goes on, and four processes with two each.
@pytest.mark.parametrize(("killed", "seconds", "processes", "devices"), [
    (0, 0.0, 1, 1), pytest.param(1, 0.02, 4, 8, marks=pytest.mark.exhaustive),
])
def test_a_killed_process_stops_the_job_which_goes_on_from_a_whole_step(
    text, tmp_path, alone, killed, seconds, processes, devices
):
  workdir = tmp_path / "run"
  process = start(2, text, workdir, *SAVES_EACH_STEP)
  one = pids(process)[killed]
  wait_for_step(process, workdir, 5)
  time.sleep(seconds)
  os.kill(one, signal.SIGKILL)
  began = time.monotonic()
  status, _, err = finish(process)
  assert time.monotonic() - began < 60
  assert status == 128 + signal.SIGKILL
  assert f"process {killed} was killed by SIGKILL" in err
  assert re.search(rf"process {1 - killed} (had status|was killed)", err), err

  status, out, err = run(processes, text, workdir, *SAVES_EACH_STEP, devices=devices)
  assert status == 0, err
  (step,) = re.findall(rf"from step (\d+) to {STEPS}", out)
  assert 4 <= int(step) < STEPS
  assert_same_run(workdir, alone)


GUARDED = ["--config.guard.in_a_row=3", "--config.guard.returns=1",
           "--config.train.checkpoint_every=4"]


@pytest.mark.exhaustive
def test_two_processes_go_back_as_one(text, tmp_path):
  folders = [tmp_path / "one", tmp_path / "two"]
  for processes, folder in enumerate(folders, 1):
    status, _, err = run(processes, text, folder, *GUARDED, faults="5:nan,6:nan,7:inf gradient")
    assert status == 0, err
    passed = json.loads((folder / "passed_over.json").read_text())
    assert (passed["spans"], passed["step"], passed["returns"]) == ([[4, 8]], 4, 1)
    assert (folder / "events.jsonl").read_text().count('"returned"') == 1
  assert_same_run(*folders)


@pytest.mark.exhaustive
def test_two_processes_stop_with_the_status_that_starts_none_again(text, tmp_path):
  bad = ",".join(f"{number}:nan" for number in range(5, 20))
  status, _, err = run(2, text, tmp_path / "run", *GUARDED, faults=bad)
  assert status == 3, err
  for number in (0, 1):
    assert f"process {number} of 2: error: the run stops after 3 skipped steps in a row" in err
  assert "Traceback" not in err
  found = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
  assert found["first"] == "the loss, although the activations of all layers are finite"


@pytest.mark.exhaustive
def test_what_differs_between_processes_is_named(text, tmp_path):
  """Starts two processes with different commands, by hand."""
  workdir = tmp_path / "run"
  script = (
      "import os, sys\n"
      "number = sys.argv[-1].removeprefix('--process-id=')\n"
      "os.execv(sys.executable, [sys.executable, *sys.argv[1:], f'--config.seed={number}'])\n"
  )
  process = subprocess.Popen(
      [sys.executable, "launch/local.py", "--processes", "2", "--", sys.executable, "-c", script,
       "-m", "dense_jax.cli.train", "--config", "experiments/smoke.py:debug",
       "--workdir", str(workdir), *SETTINGS, f"--config.data.path={text}",
       f"--config.data.cache_dir={text}/.cache"],
      cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )
  status, _, err = finish(process)
  assert status == 2, err
  for number in (0, 1):
    assert (
        f"process {number} of 2: error: the configuration is not the same in all processes" in err
    )
  assert "Traceback" not in err
  assert not workdir.exists()


def recorded_rows(workdir):
  """Returns step -> the digests of its batch's rows, sorted, of all processes together."""
  starts = {}
  for file in (workdir.parent / "rows").iterdir():
    start = file.name.partition("-")[0]  # Of all processes of one start.
    for line in file.read_text().splitlines():
      step, rows = json.loads(line)
      starts.setdefault((step, start), []).extend(rows)
  steps = {}
  for (step, _), rows in starts.items():
    assert steps.setdefault(step, sorted(rows)) == sorted(rows)  # Also where a step is done again.
  return steps


def test_eight_devices_in_two_processes_then_four_in_one_see_the_same_batches(text, tmp_path):
  record = {"module": "tests.training.record_rows"}
  whole, workdir = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
  for folder in (whole, workdir):
    (folder.parent / "rows").mkdir(parents=True)
  status, _, err = run(1, text, whole, **record)
  assert status == 0, err

  process = start(2, text, workdir, **record)
  pids(process)
  wait_for_step(process, workdir, 4)
  process.send_signal(signal.SIGTERM)
  status, out, err = finish(process)
  assert status == 1, err
  assert "2 processes x 4 devices" in out
  status, out, err = run(1, text, workdir, devices=4, **record)
  assert status == 0, err
  assert "devices: 4 x cpu" in out
  (step,) = re.findall(rf"from step (\d+) to {STEPS}", out)
  assert 4 <= int(step) < STEPS

  rows = recorded_rows(whole)
  assert recorded_rows(workdir) == rows
  assert rows.keys() == set(range(STEPS)) and all(len(batch) == 8 for batch in rows.values())
  assert len({row for batch in rows.values() for row in batch}) > STEPS
  assert_same_run(workdir, whole)
