"""The Slurm script, run by bash with stand-ins for Slurm's programs."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.helpers import ROOT
from tests.launch.stand_ins import read_calls, write_program, write_recorders

SCRIPT = ROOT / "launch" / "slurm.sbatch"
ARGUMENTS = ["--config", "experiments/smoke.py", "--workdir", "/shared/a b", "--config.seed=3"]


# Runs the tasks one after the other, and ends as srun does: with the highest signal of a task, or
# else with its highest status.
SRUN = """\
import os, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith(("--kill-on", "--wait"))]
statuses = [
    subprocess.run(command, env=os.environ | {{"SLURM_PROCID": str(number)}}).returncode
    for number in range({tasks})
]
sys.exit(128 - min(statuses) if min(statuses) < 0 else max(statuses))
"""


@pytest.fixture
def job(tmp_path):
  """Returns a function that runs the script.

  It is given the Python source of each task, in which `number` is the task's, and the job's state;
  or the Python source of a program of Slurm's.
  """
  programs = tmp_path / "bin"

  def start(train, state="RUNNING", tasks=1, squeue="", scontrol="", **environment):
    calls = str(tmp_path / "calls")
    write_program(programs, "srun", (
        "import json, sys\n"
        f"open({calls!r}, 'a').write(json.dumps([sys.argv[1:], '']) + '\\n')\n"
        + SRUN.format(tasks=tasks)
    ))
    write_program(programs, "python", (
        "import os, signal, sys\nnumber = int(os.environ['SLURM_PROCID'])\n" + train
    ))
    write_program(programs, "squeue", squeue or f"print({state!r})")
    write_program(programs, "sleep", "")
    if scontrol:
      write_program(programs, "scontrol", scontrol)
    else:
      write_recorders(programs, tmp_path / "calls", "scontrol")
    settings = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                "VENV": str(tmp_path), **environment}
    return subprocess.Popen(
        ["bash", SCRIPT, *ARGUMENTS], env=os.environ | settings, stderr=subprocess.PIPE, text=True
    )

  start.calls = lambda: [call for call, _ in read_calls(tmp_path / "calls")]
  return start


def directives():
  lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.M)
  return dict(lines)


def test_directives():
  given = directives()
  assert len(given) == SCRIPT.read_text().count("\n#SBATCH")
  # One process per GPU, as jax expects.
  assert given["ntasks-per-node"] == given["gpus-per-node"]
  # The signal goes to the tasks, not to the script's shell (which would be B:TERM).
  assert re.fullmatch(r"TERM@\d+", given["signal"])
  assert "requeue" in given and given["open-mode"] == "append"


def test_tasks_train_with_the_scripts_arguments(job, tmp_path):
  given = tmp_path / "given"
  assert job(f"open({str(given)!r}, 'w').write(repr(sys.argv[1:]))").wait(timeout=30) == 0
  assert given.read_text() == repr(["-m", "dense_jax.cli.train", *ARGUMENTS])
  # When one task saves and ends, srun must not kill the others.
  assert job.calls()[0][:2] == ["--kill-on-bad-exit=0", "--wait=300"]


@pytest.mark.parametrize(("status", "state", "restarts", "queued"), [
    (0, "RUNNING", 0, False), (2, "RUNNING", 0, False), (3, "RUNNING", 0, False),
    (1, "RUNNING", 0, True),
    (137, "RUNNING", 9, True), (134, "RUNNING", 10, False), (1, "CANCELLED", 0, False),
    (1, "COMPLETING", 0, False), (1, "SIGNALING", 0, True),
])
def test_what_is_queued_again(job, status, state, restarts, queued):
  process = job(f"sys.exit({status})", state, SLURM_RESTART_COUNT=str(restarts))
  _, err = process.communicate(timeout=30)
  assert (["scontrol", "requeue", "7"] in job.calls()) == queued, err
  assert process.returncode == (0 if queued else status)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("status", [2, 3])
def test_peers_of_a_task_that_would_fail_again_do_not_queue_it(job, number, status):
  train = f"sys.exit({status}) if number == {number} else os.kill(os.getpid(), signal.SIGABRT)"
  process = job(train, tasks=2)
  _, err = process.communicate(timeout=30)
  assert process.returncode == status, err
  assert len(job.calls()) == 1


@pytest.mark.parametrize("failures", [2, 99])
def test_a_state_that_is_not_known_does_not_forbid_it(job, tmp_path, failures):
  process = job("sys.exit(1)", squeue=(
      "import sys\n"
      f"with open({str(tmp_path / 'asked')!r}, 'a+') as file:\n"
      "  file.write('x')\n"
      "  file.seek(0)\n"
      f"  if len(file.read()) <= {failures}: sys.exit('cannot contact slurm controller')\n"
      "print('RUNNING')"
  ))
  _, err = process.communicate(timeout=30)
  assert ["scontrol", "requeue", "7"] in job.calls(), err
  assert (process.returncode, len((tmp_path / "asked").read_text())) == (0, min(failures + 1, 5))


def test_a_job_that_cannot_be_queued_ends_with_the_status_of_training(job):
  process = job("sys.exit(7)", scontrol="raise SystemExit(1)")
  process.communicate(timeout=30)
  assert process.returncode == 7


def test_the_shell_waits_for_tasks_that_save(job, tmp_path):
  started, saved = tmp_path / "started", tmp_path / "saved"
  process = job(
      # Slurm's signals reach the shell around a task too.
      f"import time\nos.kill(os.getppid(), signal.SIGTERM)\nopen({str(started)!r}, 'w')\n"
      f"time.sleep(1)\nopen({str(saved)!r}, 'w')\nsys.exit(1)"
  )
  while process.poll() is None and not started.exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert saved.exists()
  assert ["scontrol", "requeue", "7"] in job.calls()
