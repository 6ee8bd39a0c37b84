"""Costs of programs for an H100, by the real compiler: loops by their trips, kernels by authors."""

import pytest

from tests.helpers import run_with_gpu_compiler

pytestmark = [pytest.mark.slow, pytest.mark.gpu_compiler]


@pytest.fixture(scope="module")
def found():
  return run_with_gpu_compiler("tests/runs/gpu_programs.py", timeout=600)


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
