"""Costs of programs for an H100, by the real compiler: loops by their trips, kernels by authors."""

import json
import os
import subprocess

import pytest

from tests.helpers import ROOT, gpu_compiler_python

pytestmark = [pytest.mark.slow, pytest.mark.gpu_compiler]


@pytest.fixture(scope="module")
def found():
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  result = subprocess.run(
      [gpu_compiler_python(), ROOT / "tests" / "runs" / "gpu_programs.py"],
      env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
      capture_output=True, text=True, timeout=600, check=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  return json.loads(result.stdout.splitlines()[-1])


def test_a_scanned_model_costs_what_its_unrolled_twin_does(found):
  scanned, unrolled = found["scanned"], found["unrolled"]
  assert scanned["matmul_flops"] == pytest.approx(unrolled["matmul_flops"], rel=0.01)
  assert scanned["flops"] == pytest.approx(unrolled["flops"], rel=0.05)
  # The loop also takes slices of its parameters.
  assert unrolled["launches"] < scanned["launches"] < 2 * unrolled["launches"]


@pytest.mark.parametrize("kernel", ["triton", "mosaic"])
def test_a_kernels_cost_reaches_the_compiled_program(found, kernel):
  cost, said = found[kernel], found["of kernels"]
  assert cost["matmul_flops"] == cost["flops"] == said["matmul_flops"]
  assert cost["transcendentals"] == said["transcendentals"]
  # With what the loop moves besides.
  assert said["bytes_accessed"] <= cost["bytes"] < 3 * said["bytes_accessed"]
  assert 5 <= cost["launches"] < 50
