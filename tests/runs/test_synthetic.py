"""Runs of synthetic tasks: from training to a report, and tasks that models solve."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from dense_jax import experiment, runs
from dense_jax.cli import evaluate
from dense_jax.errors import InputError
from tests.helpers import ROOT

TINY = [("model.width", "16"), ("model.layers", "1"), ("data.task.heldout", "9"),
        ("train.batch_size", "8"), ("train.eval_every", "2"), ("train.log_every", "1"),
        ("train.steps", "4"), ("train.checkpoint_every", "2")]


def _config(*overrides, task="passkey"):
  return experiment.load(f"experiments/recall.py:{task}-debug", [*TINY, *overrides])


def _records(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  result = runs.train_run(_config(("data.task.eval_depths", "0.5")), folder)
  return folder, result


@pytest.mark.slow
def test_a_run_records_its_answers(finished):
  folder, result = finished
  scored = [record for record in _records(folder) if "task_accuracy" in record]
  assert [record["step"] for record in scored] == [2, 4]
  assert set(scored[0]) == {"step", *(
      f"task_{name}{length}{depth}" for name in ("accuracy", "exact")
      for length in ("", "_80") for depth in ("", "_depth0.5"))}
  assert all(0 <= value <= 1 for name, value in scored[0].items() if name != "step")
  assert result.heldout_loss < 4 and "heldout_bits_per_byte" not in result.metrics
  assert result.metrics["targets"] == 8 * 5  # Digits of each row.
  described = json.loads((folder / "data.json").read_text())
  assert described["texts"] == [] and described["files"] == {}


@pytest.mark.slow
def test_what_it_recorded_is_what_a_restored_run_scores(finished, capsys):
  folder, result = finished
  score = runs.evaluate_run(runs.restore(folder), batch_size=4)
  recorded = {name.removeprefix("task_"): value for name, value in result.metrics.items()
              if name.startswith("task_")}
  assert score.answers == pytest.approx(recorded)
  assert score.held_out.loss == pytest.approx(result.heldout_loss, rel=1e-5)
  assert (score.bits_per_byte, score.num_bytes, score.windows) == (None, 0, 9)
  file = folder / "figures.json"
  assert evaluate.main(["--workdir", str(folder), "--json", str(file)]) == 0
  out = capsys.readouterr().out
  assert "bits/byte" not in out and "answers: accuracy 0." in out
  figures = json.loads(file.read_text())
  assert figures["answers"] == pytest.approx(recorded) and figures["bits_per_byte"] is None


@pytest.mark.slow
def test_its_report_shows_answers_instead_of_text(finished):
  folder, _ = finished
  report = runs.write_report(folder)
  assert "answers right (accuracy_80)" in report.table and "bigram" not in report.table
  assert "training tokens/s" in report.table
  assert len(report.samples) == 2
  for prompt, answers in report.samples:
    assert prompt.startswith(("w1 ", "KEY ")) and prompt.endswith("?") and prompt.count("KEY") == 2
    right, model = answers.strip().splitlines()
    digits = prompt.split()[prompt.split().index("KEY") + 1 :][:5]
    assert right == "right: " + " ".join(digits) and model.startswith("model: ")
  assert report.page.exists()


def test_rows_of_held_out_data_of_any_length(finished):
  folder, _ = finished
  batches = runs.heldout_rows(runs.restore(folder), 4, 0, 50)
  assert [batch.tokens_BT.shape for batch in batches] == [(4, 50)] * 3


@pytest.mark.slow
def test_a_run_that_goes_on_trains_on_the_same_rows(tmp_path):
  whole = runs.train_run(_config(task="mqar"), tmp_path / "whole")
  first = [("train.steps", "2"), ("optimizer.schedule_steps", "4")]
  runs.train_run(_config(*first, task="mqar"), tmp_path / "part")
  # Further lengths to score may come later.
  more = [("optimizer.schedule_steps", "4"), ("data.task.eval_lengths", "100")]
  part = runs.train_run(_config(*more, task="mqar"), tmp_path / "part")
  losses = [
      [record["loss"] for record in _records(tmp_path / name) if "loss" in record]
      for name in ("whole", "part")
  ]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
  assert "task_accuracy_100" in part.metrics
  assert part.metrics["task_accuracy"] == whole.metrics["task_accuracy"]
  with pytest.raises(InputError, match=r"config\.data\.task\.size: the run has 4, now 2"):
    runs.train_run(_config(*more, ("data.task.size", "2"), task="mqar"), tmp_path / "part")


# (task, family): the keys with which two layers of 64 channels solve it in 700 steps of 64 rows or
# fewer.
SOLVED = {
    ("mqar", "transformer"): {
        "data.seq_len": 24, "data.task.size": 4, "data.task.vocab_size": 64,
        "model.mixer.heads": 1, "optimizer.learning_rate": 1e-3,
    },
    ("copying", "mamba"): {
        "data.seq_len": 32, "data.task.size": 4, "optimizer.learning_rate": 5e-3,
    },
    ("induction", "mamba"): {"data.seq_len": 32, "optimizer.learning_rate": 3e-3},
}


def _is_solved(folder):
  """Tells whether a score of a run, which may be writing its records, is a solution's."""
  file = folder / "metrics.jsonl"
  *whole, _ = file.read_text().split("\n") if file.exists() else [""]
  return any(
      record.get("task_accuracy", 0) > 0.99 and record["task_exact"] > 0.97
      for record in map(json.loads, whole)
  )


@pytest.mark.parametrize(("task", "family"), [
    pytest.param(*case, marks=pytest.mark.slow if case == ("mqar", "transformer") else
                 pytest.mark.exhaustive)
    for case in SOLVED
])
def test_solvable_tasks_are_solved(task, family, tmp_path):
  """Trains until a score shows it, on one device, as eight would share two cores."""
  with (tmp_path / "log").open("wb") as log:
    process = subprocess.Popen(
        [sys.executable, "-m", "dense_jax.cli.train", "--config", f"experiments/recall.py:{task}",
         "--workdir", str(tmp_path / "run"), f"--config.model.family={family}",
         "--config.model.layers=2", "--config.train.batch_size=64", "--config.train.steps=700",
         "--config.train.eval_every=100", "--config.data.task.eval_lengths=",
         *(f"--config.{key}={value}" for key, value in SOLVED[task, family].items())],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdout=log, stderr=log,
    )
  try:
    end = time.monotonic() + 600
    while process.poll() is None and not _is_solved(tmp_path / "run") and time.monotonic() < end:
      time.sleep(0.2)
  finally:
    process.kill()
    process.wait()
  assert _is_solved(tmp_path / "run"), (tmp_path / "log").read_text()[-4000:]
