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


@pytest.fixture
def job(tmp_path):
  """Returns a function that runs the script; it is given srun's Python source and a job state."""
  programs = tmp_path / "bin"

  def start(srun, state="RUNNING", **environment):
    calls = str(tmp_path / "calls")
    write_program(programs, "srun", (
        "import json, sys\n"
        f"open({calls!r}, 'a').write(json.dumps([sys.argv[1:], '']) + '\\n')\n" + srun
    ))
    write_program(programs, "squeue", f"print({state!r})")
    write_recorders(programs, tmp_path / "calls", "scontrol")
    settings = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment}
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


def test_tasks_train_with_the_scripts_arguments(job):
  assert job("", VENV="/shared/env").wait(timeout=30) == 0
  ((*options, python, dash_m, module), ) = [job.calls()[0][:-len(ARGUMENTS)]]
  assert job.calls()[0][-len(ARGUMENTS):] == ARGUMENTS
  assert (python, dash_m, module) == ("/shared/env/bin/python", "-m", "dense_jax.cli.train")
  # When one task saves and ends, srun must not kill the others.
  assert options == ["--kill-on-bad-exit=0", "--wait=300"]


@pytest.mark.parametrize(("status", "state", "restarts", "queued"), [
    (0, "RUNNING", 0, False), (2, "RUNNING", 0, False), (3, "RUNNING", 0, False),
    (1, "RUNNING", 0, True),
    (137, "RUNNING", 9, True), (134, "RUNNING", 10, False), (1, "CANCELLED", 0, False),
    (1, "COMPLETING", 0, False),
])
def test_what_is_queued_again(job, status, state, restarts, queued):
  process = job(f"sys.exit({status})", state, SLURM_RESTART_COUNT=str(restarts))
  _, err = process.communicate(timeout=30)
  assert (["scontrol", "requeue", "7"] in job.calls()) == queued, err
  assert process.returncode == (0 if queued else status)


def test_the_shell_waits_for_tasks_that_save(job, tmp_path):
  started, saved = tmp_path / "started", tmp_path / "saved"
  process = job(
      f"import time\nopen({str(started)!r}, 'w')\n"
      f"time.sleep(1)\nopen({str(saved)!r}, 'w')\nsys.exit(1)"
  )
  while process.poll() is None and not started.exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert saved.exists()
  assert ["scontrol", "requeue", "7"] in job.calls()
