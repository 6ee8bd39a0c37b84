"""`evaluate --tasks`: what it prints and writes, and what it refuses."""

import json

import pytest

from dense_jax import runs
from dense_jax.cli import evaluate
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from dense_jax.models.params import get_params
from tests.builders import model_config, random_model
from tests.task_files import write_all

HF = ["--hf", "folder"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Replaces every folder's model by a tiny one; returns a folder of tasks."""
  model = random_model(model_config("gau_retnet", vocab_size=258))
  loaded = runs.LoadedModel("folder", ByteTokenizer(), model, get_params(model))
  monkeypatch.setattr(runs, "load_folder", lambda path, strict: loaded)
  return str(write_all(tmp_path / "data"))


def test_a_table_and_its_files(folder, tmp_path, capsys):
  file, items = tmp_path / "new" / "f.json", tmp_path / "items.jsonl"
  arguments = [*HF, "--tasks", "boolq,copa", "--data", folder, "--limit", "1", "--context", "fresh"]
  assert evaluate.main([*arguments, "--json", str(file), "--items", str(items)]) == 0
  out = capsys.readouterr().out
  assert "folder (context: fresh, at most 2,048 tokens; tasks as in lm-eval" in out
  assert [line.split()[:4] for line in out.splitlines()[3:]] == [
      ["boolq", "0", "1", "acc"], ["copa", "0", "1", "acc"]]
  figures = json.loads(file.read_text())
  assert figures["tasks"]["copa"]["metrics"]["acc"]["stderr"] is None
  lines = [json.loads(line) for line in items.read_text().splitlines()]
  assert [line["task"] for line in lines] == ["boolq", "copa"]
  assert not list(file.parent.glob("*.partial"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tasks", "copa"], "--data = None is not valid: expected a folder"),
    (["--tasks", "pica", "--data", "."], "--tasks = 'pica' is not valid"),
    (["--tasks", "copa", "--data", ""], "--data = '' is not valid"),
    (["--tasks", "copa", "--data", ".", "--shots", "-1"], "--shots = -1 is not valid"),
    (["--tasks", "copa", "--data", ".", "--limit", "0"], "--limit = 0 is not valid"),
    (["--tasks", "copa", "--data", ".", "--text", "x"], "--text = 'x' is not valid: .*with"),
    (["--tasks", "copa", "--data", ".", "--items", "/proc/x"], "--items = '/proc/x' is not valid"),
    (["--data", "."], "--data = '.' is not valid: expected no value without --tasks"),
    (["--shots", "2"], "--shots = 2 is not valid: expected no value without --tasks"),
    (["--context", "fresh"], "--context = 'fresh' is not valid: expected no value without"),
])
def test_what_is_refused_before_a_model_is_loaded(monkeypatch, arguments, message):
  monkeypatch.setattr(runs, "load_folder", None)
  with pytest.raises(InputError, match=message):
    evaluate.main([*HF, *arguments])


def test_a_folder_needs_a_text(folder):
  with pytest.raises(InputError, match="--text = None is not valid: expected a text, for fo"):
    evaluate.main(HF)


def test_the_text_of_a_folder(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  text = tmp_path / "a.txt"
  text.write_text("A few words. " * 20)
  assert evaluate.main([*HF, "--text", str(text), "--json", str(tmp_path / "f.json")]) == 0
  assert capsys.readouterr().out.startswith("folder: held-out loss ")
  figures = json.loads((tmp_path / "f.json").read_text())
  assert (figures["model"], figures["bytes"], figures["window"]) == ("folder", 260, 2048)
