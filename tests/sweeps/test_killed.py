"""A sweep that is killed at random moments, and started again, has the table of an unbroken one."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.test_train import ENVIRONMENT
from tests.helpers import ROOT, write_text

SWEEP = '''
from dense_jax.sweeps.definition import Cell, Match, Sweep

def get_sweep(arg=""):
  cells = Cell("base"), Cell("dense", {"model.dense.depth": 2}, match=Match("flops", "base"))
  return Sweep("experiments/smoke.py:debug", cells, "base", seeds=(0,), question="Which?")
'''


def lines(file):
  found = [json.loads(line) for line in file.read_text().splitlines()]
  return sorted(({**line, "tokens_per_second": None} for line in found),
                key=lambda line: (line["cell"], line["seed"]))


@pytest.mark.slow
def test_a_killed_sweep_has_the_same_table(tmp_path):
  (tmp_path / "sweep.py").write_text(SWEEP)
  (tmp_path / "text").mkdir()
  text = write_text(tmp_path / "text")

  def start(workdir):
    return subprocess.Popen(
        [sys.executable, "-m", "dense_jax.cli.sweep", str(tmp_path / "sweep.py"), "--workdir",
         str(tmp_path / workdir), "--jobs", "2", "--config.train.steps=6",
         f"--config.data.path={text}", f"--config.data.cache_dir={text}/.cache",
         "--config.data.heldout_every=2"],
        cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )

  whole = start("whole")
  output = whole.communicate(timeout=600)[0]
  assert not whole.returncode, output
  assert "base" in output and "flops of base" in output

  moments = random.Random(7)
  for kill in (os.kill, os.killpg):  # The sweep alone, and with its runs.
    process = start("killed")
    time.sleep(moments.uniform(3, 15))
    if process.poll() is None:
      kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
  for _ in range(6):  # A run that outlived its sweep holds its folder until it is done.
    last = start("killed")
    output = last.communicate(timeout=600)[0]
    if not last.returncode:
      break
  assert not last.returncode, output
  assert lines(tmp_path / "killed/results.jsonl") == lines(tmp_path / "whole/results.jsonl")
