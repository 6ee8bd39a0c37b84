"""The benchmark beside lm-evaluation-harness's Hugging Face back end; skipped without torch."""

import pytest

from tests import task_files
from tests.benchmarks.test_benchmarks import run

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.slow
def test_both_agree_on_every_log_likelihood(tmp_path):
  task_files.write_all(tmp_path)
  (tmp_path / "text" / "wikitext2_raw_valid.txt").write_text(task_files.PAGES * 30)
  words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
  task_files.write_lines(tmp_path / "eval" / "lambada_openai_test.jsonl", [
      {"text": f"The number after {i} is of course {word}"} for i, word in enumerate(words)
  ])
  task_files.write_lines(tmp_path / "eval" / "arc_easy_validation.jsonl", [
      {"question": f"Which is {word}?", "choices": [word, "none", "all"], "label": 0}
      for word in words
  ])
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
