"""Tests that the kernels for GPUs compile for an H100, with the real compiler."""

import pytest

from tests.helpers import run_with_gpu_compiler

# Program of gpu_kernels.py -> arrays [B, T, E] that a pass with gradients may move. Of a selective
# recurrence with n sources that is at least 2 for each in the forward pass (x, states), and 5 in
# the backward one, with the products of dt's gradient. Of an injection of n sources it is 2 + n in
# the forward pass, 5 + 2 n in the backward one, 2 for the gate, and 4 for copies of the own input,
# which the program returns. Those of matrix states are what chunks of 64 tokens move: with 256 it
# was a fifth less for mamba2 and a quarter less for retnet, and slower on a card. Their gates are
# low-rank, so that the gates' gradients are read again, for those of their factors. With the two
# shallow sources of a retention apart it was 99.
ARRAYS = {
    "selective-1": 18, "selective-3": 43, "mamba2-2": 51, "retnet-3": 84, "injection-1": 17,
    "injection-2": 20,
}


@pytest.mark.slow
@pytest.mark.gpu_compiler
def test_recurrences_compile_for_an_h100_and_move_few_arrays():
  found = run_with_gpu_compiler("tests/ops/gpu_kernels.py", timeout=900)
  assert found.keys() == ARRAYS.keys()
  for name, limit in ARRAYS.items():
    assert found[name]["matmul_flops"] > 0, (name, found[name])
    assert found[name]["arrays"] <= limit, (name, found[name])
