"""The train steps of published sizes compile for a TPU, by the real compiler, and fit."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT, tpu_compiler_environment


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["dense_mamba_370m", "dense_retnet_350m"])
def test_train_step_compiles_for_v5e_and_fits(name, tmp_path):
  """Four sequences a chip of four, the parameters split over them."""
  command = [
      sys.executable, "-m", "dense_jax.cli.compile", "--config", f"experiments/{name}.py",
      "--topology", "v5e:2x2", "--mesh", "fsdp=-1", "--config.train.batch_size=16",
      "--json", str(tmp_path / "report.json"),
  ]
  result = subprocess.run(
      command, cwd=ROOT, env=tpu_compiler_environment(), capture_output=True, text=True,
      timeout=900, check=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  hbm = json.loads((tmp_path / "report.json").read_text())["hbm"]
  assert hbm["arguments"] + hbm["temporaries"] < hbm["capacity"], hbm
