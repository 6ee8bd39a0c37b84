"""The benchmark beside lm-evaluation-harness's Hugging Face back end; skipped without torch."""

import pytest

from tests.benchmarks.test_benchmarks import run
from tests.evaluation import published

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.slow
def test_both_agree_on_every_log_likelihood(tmp_path):
  published.write(tmp_path, 8)
  (tmp_path / "text").mkdir()
  page = (tmp_path / "wiki.test.raw").read_text()
  (tmp_path / "text" / "wikitext2_raw_valid.txt").write_text(page * 30)
  record, output = run("harness", tmp_path, "--quick", "--data", str(tmp_path))
  results = record["results"]
  assert len(results) == 10
  for found in results.values():
    assert max(found["difference"], found["adapter_difference"]) <= 1e-4
    assert found["greedy_equal"] and found["ratio"] > 0
    for name in found["rival"]:
      assert found["ours"][name] == pytest.approx(found["rival"][name], rel=1e-5)
      assert found["adapter"][name] == pytest.approx(found["rival"][name], rel=1e-5)
  assert record["rival"].keys() >= {"lm_eval", "transformers", "torch"}
  assert "| NO |" not in output
