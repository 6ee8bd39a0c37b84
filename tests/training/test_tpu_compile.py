"""The train steps of published sizes compile for a TPU, by the real compiler, and fit."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT, tpu_compiler_environment

V5E_BYTES = 16e9


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["dense_mamba_370m", "dense_retnet_350m"])
def test_train_step_compiles_for_v5e_and_fits(name):
  script = ROOT / "tests" / "training" / "tpu_train_step.py"
  result = subprocess.run(
      [sys.executable, script, ROOT / "experiments" / f"{name}.py", "4"],
      env=tpu_compiler_environment(), capture_output=True, text=True, timeout=900, check=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  memory = json.loads(result.stdout.splitlines()[-1])
  assert memory["arguments"] + memory["temporaries"] < V5E_BYTES, memory
