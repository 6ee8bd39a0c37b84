"""Tasks of a loaded model: figures, what goes on where it stopped, scores during training."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest

from dense_jax.config import EvalConfig, ExperimentConfig
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from dense_jax.evaluation.evaluators import Snapshot
from dense_jax.evaluation.likelihood import Likelihood
from dense_jax.evaluation.task_data import load_task
from dense_jax.models.params import get_params
from dense_jax.runs import LoadedModel, evaluate_tasks
from dense_jax.runs.evaluating import with_standard
from dense_jax.runs.tasks import NAMES, load_tasks, window_of
from tests.builders import model_config, random_model
from tests.task_files import COUNTS, write_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(write_all(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def model():
  built = random_model(model_config("gau_retnet", vocab_size=258))
  return LoadedModel("a model", ByteTokenizer(), built, get_params(built))


def log_likelihoods(report):
  return [line["log_likelihoods"] for line in report.item_lines()]


def test_a_report(model, folder):
  report = evaluate_tasks(model, load_tasks("copa,lambada", folder, limit=2), batch_size=2)
  figures = json.loads(json.dumps(report.figures()))
  assert figures["model"] == "a model" and figures["context"] == "carried"
  assert figures["versions"]["tasks"] == "lm-evaluation-harness 0.4.13"
  assert set(figures["sha256"]) == {"config", "params", "tokenizer"}
  lambada = figures["tasks"]["lambada"]
  assert (lambada["counts"], lambada["items_in_file"]) == ({"items": 2}, 3)
  assert list(lambada["metrics"]) == ["acc", "perplexity"]
  lines = list(report.item_lines())
  assert [(line["task"], line["item"], line["id"]) for line in lines] == [
      ("copa", 0, "0"), ("copa", 1, "1"), ("lambada", 0, ""), ("lambada", 1, "")]
  assert all(len(line["log_likelihoods"]) == len(line["greedy"]) for line in lines)
  mean = np.mean([line["log_likelihoods"][0] for line in lines[2:]])
  assert lambada["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(-mean))
  assert report.table().split("\n")[0].split() == [
      "task", "shots", "items", "metric", "value", "stderr"]
  assert report.describe() == (
      "a model (context: carried; tasks as in lm-evaluation-harness 0.4.13)")
  assert window_of(model) == 2048


class Killed(BaseException):
  """What ends a process at any moment."""


def test_an_evaluation_that_was_killed_goes_on(model, folder, tmp_path, monkeypatch):
  data = load_tasks("copa,winogrande", folder)
  whole = evaluate_tasks(model, data, batch_size=2)
  partial, score = tmp_path / "new" / "f.partial", Likelihood.score
  asked = []

  def counted(self, requests, on_done=None):
    asked.append(len(requests))
    return score(self, requests, on_done)

  def killed(self, requests, on_done=None):
    def once(scores):
      on_done(scores)
      if partial.read_text().count("\n") > 2:  # The key and two items.
        raise Killed

    return score(self, requests, once)

  monkeypatch.setattr(Likelihood, "score", killed)
  with pytest.raises(Killed):
    evaluate_tasks(model, data, batch_size=1, partial=partial)
  with partial.open("a") as file:
    file.write('{"items": "cut sho')
  monkeypatch.setattr(Likelihood, "score", counted)
  report = evaluate_tasks(model, data, batch_size=2, partial=partial)
  assert sum(asked) == 8 - 2 * 2  # Two items of two requests each were known.
  for scores, expected in zip(log_likelihoods(report), log_likelihoods(whole), strict=True):
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
  asked.clear()
  again = evaluate_tasks(model, data, partial=partial)
  assert sum(asked) == 0 and log_likelihoods(again) == log_likelihoods(report)
  # Another model's scores are not taken.
  changed = {name: value + 1 for name, value in model.params.items()}
  evaluate_tasks(dataclasses.replace(model, params=changed), data[:1], partial=partial)
  assert sum(asked) == 4


def snapshot(model, config):
  data = types.SimpleNamespace(tokenizer=model.tokenizer)
  return Snapshot(3, config, model.model, model.params, data, slice(None), jax.device_put)


@pytest.mark.slow
def test_scores_during_training(model, folder):
  config = ExperimentConfig(eval=EvalConfig(tasks="copa,boolq", data=folder, items=1, every=7))
  [heldout, tasks] = with_standard([], config)
  assert (heldout.name, tasks.name, tasks.every) == ("heldout", "tasks", 7)
  taken = snapshot(model, config)
  numbers = tasks.evaluate(taken)
  expected = evaluate_tasks(model, load_tasks("copa,boolq", folder, limit=1), batch_size=8)
  assert numbers == {
      f"{score.data.task}_acc": score.metrics.values["acc"] for score in expected.scores}
  assert tasks.describe(numbers, taken) == (
      f"tasks: acc copa {numbers['copa_acc']:.4g}, acc boolq {numbers['boolq_acc']:.4g}")
  assert len(with_standard([tasks], config)) == 2
  assert len(with_standard([], ExperimentConfig())) == 1


@pytest.mark.parametrize(("values", "message"), [
    ({"tasks": "cupa"}, "config.eval.tasks = 'cupa' is not valid"),
    ({"tasks": "copa"}, "config.eval.data = '' is not valid"),
    ({"tasks": "copa", "data": "no/such"}, "config.eval.data = 'no/such' is not valid"),
])
def test_tasks_of_a_run_are_checked_before_it_begins(values, message):
  with pytest.raises(InputError, match=message):
    with_standard([], ExperimentConfig(eval=EvalConfig(**values)))


# Shots -> task -> correct choices (or words), and the sum of all log-likelihoods, of a
# `random_model` of gau_retnet, which NumPy's generator makes the same everywhere.
GOLDEN = {
    0: {
        "wikitext": (0, -1015.19), "lambada": (0, -86.51), "hellaswag": (1, -886.60),
        "piqa": (0, -371.43), "winogrande": (1, -239.49), "arc_easy": (0, -228.66),
        "arc_challenge": (2, -190.62), "boolq": (1, -90.82), "copa": (1, -514.33),
        "openbookqa": (3, -220.82), "storycloze": (0, -328.92),
    },
    1: {
        "wikitext": (0, -1015.19), "lambada": (0, -85.05), "hellaswag": (0, -890.21),
        "piqa": (0, -366.06), "winogrande": (1, -239.04), "arc_easy": (0, -225.85),
        "arc_challenge": (2, -188.29), "boolq": (1, -90.76), "copa": (1, -510.77),
        "openbookqa": (3, -221.10), "storycloze": (0, -325.69),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("shots", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_all_eleven_tasks(model, folder, shots):
  report = evaluate_tasks(model, load_tasks(",".join(NAMES), folder, shots=shots))
  found = {}
  for score in report.scores:
    assert len(score.data.items) == COUNTS[score.data.task]
    total = sum(one.log_likelihood for scores in score.scored for one in scores)
    right = round(score.metrics.values.get("acc", 0) * len(score.data.items))
    found[score.data.task] = (right, pytest.approx(total, abs=0.01))
  assert GOLDEN[shots] == found


@pytest.mark.slow
def test_fresh_and_carried_documents(model, folder):
  [data] = [load_task("wikitext", folder)]
  reports = [evaluate_tasks(model, [data], carried=carried) for carried in (False, True)]
  first, second = (report.scores[0].metrics.values["bits_per_byte"] for report in reports)
  assert first == pytest.approx(second, rel=1e-6)  # The pages are shorter than the window.
  assert reports[0].context == "fresh, at most 2,048 tokens"
