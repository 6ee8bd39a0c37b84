"""Scoring a run: figures of any size, and refusals before anything is scored."""

import json
import math

import numpy as np
import pytest
from flax import nnx

from dense_jax import experiment, runs
from dense_jax.cli import evaluate
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import get_params, with_params
from dense_jax.runs import scoring
from tests.helpers import write_text


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Replaces every run by an untrained one of 32-byte windows; returns its parameters' setter."""
  text = write_text(tmp_path)
  overrides = [
      ("model.vocab_size", "258"), ("model.width", "16"), ("model.layers", "2"),
      ("data.seq_len", "32"), ("data.path", str(text)), ("data.heldout_every", "2"),
      ("data.cache_dir", str(tmp_path / "cache")),
  ]
  config = experiment.load("experiments/smoke.py:debug", overrides)
  model = LanguageModel(config.model, rngs=nnx.Rngs(0))
  params = get_params(model)

  def set_params(change):
    changed = {name: change(name, value) for name, value in params.items()}
    run = runs.Run("a run", ByteTokenizer(), with_params(model, changed), changed, config, 4)
    monkeypatch.setattr(runs, "restore", lambda workdir, which, weights, strict: run)

  set_params(lambda name, value: value)
  return set_params


def _figures(file):
  def refuse(token):
    raise AssertionError(f"{token} is no JSON")

  return json.loads(file.read_text(), parse_constant=refuse)


def test_the_context_is_told(run, tmp_path, capsys):
  file = tmp_path / "new" / "figures.json"
  assert evaluate.main(["--workdir", "run", "--json", str(file)]) == 0
  assert capsys.readouterr().out.endswith(" bits/byte (context: fresh every 32 tokens)\n")
  figures = _figures(file)
  assert (figures["context"], figures["window"]) == ("fresh every 32 tokens", 32)
  assert figures["perplexity"] == math.exp(figures["loss"])
  with pytest.raises(SystemExit):
    evaluate.main(["--help"])
  assert "context is fresh every seq_len tokens" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("batch_size", [10**9, 10**30, 7])
def test_any_batch_size_gives_the_same_figures(run, tmp_path, batch_size):
  for size, name in ((16, "a"), (batch_size, "b")):
    arguments = ["--workdir", "run", "--batch-size", str(size), "--json", str(tmp_path / name)]
    assert evaluate.main(arguments) == 0
  first, second = (_figures(tmp_path / name) for name in "ab")
  assert second.pop("loss") == pytest.approx(first.pop("loss"), rel=1e-6)
  assert second["targets"] == first["targets"]


def test_windows_that_cannot_fit_are_refused(run, monkeypatch):
  monkeypatch.setattr(scoring, "device_memory", lambda: 5 * 32 * 16 * 4)
  with pytest.raises(InputError, match=r"^--batch-size = 16 is not valid: expected at most 5: one"):
    evaluate.main(["--workdir", "run", "--batch-size", "16"])
  assert evaluate.main(["--workdir", "run", "--batch-size", "5"]) == 0


@pytest.mark.parametrize(("factor", "loss", "perplexity"), [
    (1e7, True, False), (math.inf, False, False), (math.nan, False, False),
])
def test_figures_that_are_not_finite_are_null(run, tmp_path, capsys, factor, loss, perplexity):
  """A loss of thousands of nats has a perplexity beyond float64."""
  run(lambda name, value: value * np.float32(factor) if name == "embedding" else value)
  assert evaluate.main(["--workdir", "run", "--json", str(tmp_path / "figures.json")]) == 0
  figures = _figures(tmp_path / "figures.json")
  found = [figures[key] is not None for key in ("loss", "perplexity", "bits_per_byte")]
  assert found == [loss, perplexity, loss]
  assert "held-out loss" in capsys.readouterr().out
  if loss:
    assert figures["loss"] > 710


@pytest.mark.parametrize(("option", "value"), [
    ("--json", ""), ("--json", "."), ("--json", "/proc/figures.json"), ("--text", ""),
    ("--text", "no/such/text"), ("--batch-size", "0"), ("--batch-size", "-3"),
])
def test_bad_options_are_named_before_a_run_is_loaded(monkeypatch, option, value):
  monkeypatch.setattr(runs, "restore", None)
  with pytest.raises(InputError, match=f"^{option} = "):
    evaluate.main(["--workdir", "run", option, value])
