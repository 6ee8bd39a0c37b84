"""A compiled step of decoding moves little more than its bf16 weights and its states."""

import pytest

from experiments.benchmarks import prices
from experiments.benchmarks.prices import DECODE_BAR, Cell
from tests.helpers import gpu_compiler_python, tpu_compiler_environment

SIZE = ("model.layers=3", "model.width=512", "model.vocab_size=4096")
CASES = [
    *(pytest.param("h100", *case, marks=pytest.mark.gpu_compiler) for case in (
        ("mamba2", "base", 1), ("mamba2", "state m=2", 64), ("retnet", "base", 64),
        ("gau_retnet", "state m=2", 64),
    )),
    *(pytest.param("v5e", *case, marks=pytest.mark.tpu_compiler) for case in (
        ("mamba2", "base", 64), ("gau_retnet", "state m=2", 1), ("mamba", "base", 64),
    )),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "family", "kind", "rows"), CASES)
def test_weights_and_states_are_moved_once(monkeypatch, target, family, kind, rows):
  needs = gpu_compiler_python if target == "h100" else tpu_compiler_environment
  needs()  # Skips the test where there is no compiler.
  monkeypatch.delenv("XLA_FLAGS")  # Of the tests' own simulated devices.
  cell = Cell(target, family, kind, SIZE, rows)
  report = prices.measure(cell)
  assert report is not None
  weights, states = prices.least_bytes(cell, report)
  # A TPU keeps some of a small model's states in its fast memory.
  assert 0.6 < report["bytes_accessed"] / (weights + states) <= DECODE_BAR
