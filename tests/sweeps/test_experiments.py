"""Every sweep of `experiments/sweeps/` runs to its end, as a smoke test of tiny models."""

import json
import subprocess
import sys

import pytest

from dense_jax.cli import sweep as command
from dense_jax.sweeps import running
from dense_jax.sweeps.definition import load_sweep
from tests.helpers import ROOT, TOY_ENVIRONMENT, write_text

FILES = sorted((ROOT / "experiments" / "sweeps").glob("*.py"))
FILES.remove(ROOT / "experiments" / "sweeps" / "gpu.py")  # test_gpu_sweep.py runs it.
# What a launcher does, in one process: its runs by the printed commands, then the table of them.
LAUNCH = """
import contextlib, io, shlex, sys
from dense_jax.cli import sweep, train
commands = io.StringIO()
with contextlib.redirect_stdout(commands):
  sweep.main([*sys.argv[1:], "--commands"])
for command in commands.getvalue().splitlines():
  program, task, *arguments = shlex.split(command)
  assert (program, task) == ("dense-jax", "train")
  assert not train.main(arguments)
sys.exit(sweep.main([*sys.argv[1:], "--table"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_debug_runs_to_its_end_once(file, tmp_path, monkeypatch, capsys):
  name = f"{file.relative_to(ROOT)}:debug"
  monkeypatch.chdir(ROOT)
  sweep = load_sweep(name)
  arguments = [name, "--workdir", str(tmp_path / "runs")]
  if sweep.metric == "heldout_loss":  # Otherwise a task makes its own data.
    (tmp_path / "text").mkdir()
    text = write_text(tmp_path / "text")
    arguments += [f"--config.data.path={text}", f"--config.data.cache_dir={text}/.cache",
                  "--config.data.heldout_every=2"]
  done = subprocess.run(
      [sys.executable, "-c", LAUNCH, *arguments], cwd=ROOT, env=TOY_ENVIRONMENT, timeout=600,
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  record = tmp_path / "runs" / "results.jsonl"
  before = record.read_bytes()
  found = [json.loads(line) for line in before.decode().splitlines()]
  cells = [cell.name for cell in sweep.cells]
  assert {cell.name for cell in load_sweep(name.removesuffix(":debug")).cells} > set(cells)
  assert sorted(line["cell"] for line in found) == sorted(cells)

  monkeypatch.setattr(running, "run_jobs", lambda *_, **__: pytest.fail("a run was done again"))
  assert command.main(arguments) == 0
  table = capsys.readouterr().out.splitlines()
  for cell, line in zip(cells, table[1 : 1 + len(cells)], strict=True):
    metric = next(each["metrics"][sweep.metric] for each in found if each["cell"] == cell)
    assert line.startswith(cell) and f" {metric:.4f}" in line
  assert record.read_bytes() == before
