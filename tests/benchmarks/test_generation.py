"""The benchmark of generation runs to its end, and its figures are those that docs promise."""

import pytest

from tests.benchmarks.test_benchmarks import run


@pytest.mark.exhaustive
def test_generation(tmp_path):
  text = tmp_path / "text"
  text.write_text("To be, or not to be, that is the question. " * 50)
  record, output = run("generation", tmp_path, "--quick", "--text", str(text))
  (memory,) = record["results"]["memory"].values()
  # A hundred times the text, in the same memory up to what the allocator keeps.
  assert memory["peak_100000"] < memory["peak_1000"] + 64 * 2**20
  (drift,) = record["results"]["drift"].values()
  assert 0 < drift["mean_abs"] < 1e-2 and 0 < drift["kl"] < 1e-4
  (batches,) = record["results"]["batches"].values()
  assert batches["changed_8"] == 0 and batches["difference"] < 1e-4
  assert "| mamba | " in output
