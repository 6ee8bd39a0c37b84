"""The sweep for a GPU that one has for minutes, rehearsed at toy size, as its header says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from dense_jax.sweeps.definition import load_sweep
from tests.helpers import ROOT

FILE = "experiments/sweeps/gpu.py"


def commands(header):
  """Returns the commands of the sweep's header, each as its words."""
  joined = re.sub(r"\\\n +", "", header)
  return [shlex.split(line) for line in joined.splitlines()
          if line.strip().startswith("python -m ")]


def test_important_cells_come_first(monkeypatch):
  monkeypatch.chdir(ROOT)
  sweep = load_sweep(FILE)
  names = [cell.name for cell in sweep.cells]
  assert sweep.seeds == (0, 1, 2) and names[-1] == "gau_retnet wider"
  assert sweep.base_of(sweep.cells[-1]).name == "gau_retnet m=2"
  assert load_sweep(f"{FILE}:debug").experiment == "experiments/evidence.py:25m-debug"


@pytest.mark.exhaustive
def test_the_sweep_for_a_gpu_at_toy_size(tmp_path):
  """Tokenizes, comes to its limit at once, goes on without the text, and has its table."""
  tokenize, sweep, _ = commands((ROOT / FILE).read_text().split('"""')[1])
  text = tmp_path / "text.jsonl"
  text.write_text("\n".join(json.dumps({"text": f"novel {n}. " * 300}) for n in range(8)))
  replaced = {
      "experiments/evidence.py:25m": "experiments/evidence.py:25m-debug", FILE: f"{FILE}:debug",
      "--config.data.path=english_novels_train.jsonl.gz": f"--config.data.path={text}",
      "--config.data.heldout_path=english_novels_valid.jsonl.gz": "--config.data.heldout_every=4",
      "runs/novels_tokens": str(tmp_path / "tokens"),
      "--config.data.path=runs/novels_tokens": f"--config.data.path={tmp_path / 'tokens'}",
      "runs/sweeps/gpu": str(tmp_path / "runs"),
      "experiments/results/evidence_gpu.jsonl": str(tmp_path / "record.jsonl"),
  }
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  environment.pop("XLA_FLAGS", None)

  def run(words, **more):
    words = [{**replaced, **more}.get(word, word) for word in words[1:]]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=1200, check=False)
    assert not done.returncode, done.stderr[-3000:]
    print(done.stdout)
    return done.stdout

  assert "258 ids" in run(tokenize)
  text.unlink()
  assert "2 runs are left: the same command goes on" in run(sweep, **{"9": "0.001"})
  assert not (tmp_path / "record.jsonl").exists()
  output = run(sweep, **{"9": "60"})  # The machine of the tests may be busy.
  record = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
  assert {each["cell"] for each in record} == {"gau_retnet m=2", "gau_retnet wider"}
  assert "gau_retnet wider  " in output and "tokens/s" in output
  shutil.rmtree(tmp_path / "runs")  # Another machine, with the record alone.
  assert "runs are left" not in run(sweep)
  assert (tmp_path / "record.html").exists()
