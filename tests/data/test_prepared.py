"""Tokenized text in a folder: the same rows, fingerprint and texts, without the text."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dense_jax.cli import tokenize
from dense_jax.config import DataConfig
from dense_jax.data import identity, pipeline, prepared
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from tests.helpers import ROOT

TEXTS = [f"document {number} " + "word " * number for number in range(1, 9)]
EXAMPLES = [{"prompt": f"{number}?", "response": "x" * number} for number in range(1, 9)]
SMOKE = str(ROOT / "experiments/smoke.py:debug")


@pytest.fixture
def make(tmp_path):
  """Returns a function that tokenizes lines into a folder, and gives the text's configuration."""

  def made(lines, *arguments, **values):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps(line) for line in lines))
    values = {"path": str(text), "cache_dir": str(tmp_path / "cache"), "heldout_every": 4,
              "tokenizer": "bytes", "seq_len": 16, **values}
    overrides = [f"--config.data.{key}={value}" for key, value in values.items()]
    assert not tokenize.main(["--config", SMOKE, "--to", str(tmp_path / "made"), *overrides,
                              *arguments])
    return DataConfig(**values)

  return made


def of_folder(config, tmp_path):
  return dataclasses.replace(config, path=str(tmp_path / "made"), tokenizer="train")


def rows(store):
  return [store.row(index, 16) for index in range(store.num_windows(16))]


@pytest.mark.parametrize(("lines", "options"), [
    ([{"text": text} for text in TEXTS], {}),
    ([{"text": text} for text in TEXTS], {"tokenizer": "train", "vocab_size": 300}),
    (EXAMPLES, {"format": "responses", "template": "dialogue"}),
])
def test_a_folder_has_the_rows_of_its_text(make, tmp_path, lines, options, capsys):
  config = make(lines, **options)
  assert "held out" in capsys.readouterr().out
  text = pipeline.load_datasets(config)
  described = identity.describe(text)
  spelt = [list(part) for part in pipeline.texts(config, text.tokenizer)]
  (tmp_path / "text.jsonl").unlink()
  shutil.rmtree(tmp_path / "cache")
  folder = of_folder(config, tmp_path)
  found = pipeline.load_datasets(folder)
  assert found.fingerprint == text.fingerprint
  assert found.tokenizer.fingerprint == text.tokenizer.fingerprint
  assert identity.describe(found) == described
  assert not identity.explain_difference(described, identity.describe(found))
  for part in ("train", "heldout"):
    one, other = getattr(found, part), getattr(text, part)
    assert (one.fingerprint, one.num_bytes, one.num_targets) == (
        other.fingerprint, other.num_bytes, other.num_targets)
    for row, expected in zip(rows(one), rows(other), strict=True):
      for name in expected:
        np.testing.assert_array_equal(row[name], expected[name])
  assert [list(part) for part in pipeline.texts(folder, found.tokenizer)] == spelt
  assert pipeline.heldout_store(folder, found.tokenizer).fingerprint == text.heldout.fingerprint
  assert prepared.vocab_size(folder) == text.tokenizer.vocab_size


def test_the_first_documents(make, tmp_path):
  lines = [{"text": text} for text in TEXTS]
  config = make(lines, "--tokens", "60")
  whole = pipeline.load_datasets(config)
  found = pipeline.load_datasets(of_folder(config, tmp_path))
  count = found.train.num_documents
  assert found.train.num_tokens <= 60 < whole.train.starts[count + 1]
  np.testing.assert_array_equal(found.train.tokens, whole.train.tokens[:found.train.num_tokens])
  assert found.heldout.fingerprint == whole.heldout.fingerprint
  assert found.fingerprint != whole.fingerprint
  (line,) = identity.explain_difference(identity.describe(whole), identity.describe(found))
  assert "another part" in line
  assert whole.train.first(10**6) is whole.train


def test_the_first_examples(make):
  store = pipeline.load_datasets(make(EXAMPLES, format="responses")).train
  first = store.first(20)
  assert 0 < len(first.responses) == first.num_documents < store.num_documents


@pytest.mark.parametrize(("change", "message"), [
    ({"heldout_path": "x"}, r"config\.data\.heldout_path = 'x'.*has a held-out part"),
    ({"format": "responses"}, r"config\.data\.format = 'responses'.*expected 'text'"),
    ({"tokenizer": "made/tokenizer"}, ""),
    ({"tokenizer": "bytes"}, r"config\.data\.tokenizer = 'bytes'.*of the tokenized text"),
])
def test_what_does_not_fit_is_named(make, tmp_path, change, message, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = make([{"text": text} for text in TEXTS], tokenizer="train", vocab_size=300)
  folder = dataclasses.replace(of_folder(config, tmp_path), **change)
  if not message:
    assert pipeline.load_datasets(folder).tokenizer.vocab_size == 300
    return
  with pytest.raises(InputError, match=message):
    pipeline.load_datasets(folder)


def test_another_tokenizer_than_the_models_is_refused(make, tmp_path):
  config = make([{"text": text} for text in TEXTS], tokenizer="train", vocab_size=300)
  folder = of_folder(config, tmp_path)
  for load in (pipeline.load_datasets, pipeline.heldout_store):
    arguments = {"tokenizer": ByteTokenizer()}
    with pytest.raises(InputError, match=r"config\.data\.path"):
      load(folder, **arguments)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("train/tokens.bin", b"", "its train is damaged"),
    ("tokenized.json", b"{}", r"tokenized\.json is damaged"),
    ("tokenized.json", b"{", r"tokenized\.json is not JSON"),
])
def test_a_damaged_folder(make, tmp_path, name, content, message):
  config = make([{"text": text} for text in TEXTS])
  (tmp_path / "made" / name).write_bytes(content)
  with pytest.raises(InputError, match=message):
    pipeline.load_datasets(of_folder(config, tmp_path))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tokens", "-1"], r"--tokens = -1"),
    (["--tokens", "3"], r"--tokens = 3 .*the first document has more than 3 tokens"),
    (["--config.data.task.name=mqar"], "a task's rows need no text"),
    (["--to", "gs://bucket/x"], "--to"),
])
def test_what_cannot_be_made(make, arguments, message):
  with pytest.raises(InputError, match=message):
    make([{"text": text} for text in TEXTS], *arguments)


def test_nothing_is_written_over(make, tmp_path):
  make([{"text": text} for text in TEXTS])
  with pytest.raises(InputError, match="a new folder; there is something"):
    make([{"text": text} for text in TEXTS])
