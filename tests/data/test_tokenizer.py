"""Tokenizers: exact round trips, training, the cache."""

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_jax.config import DataConfig
from dense_jax.data import sources, tokenizer, tokenizer_training
from dense_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = "".join(
    f"def function_{i}(self, value):\n    if value > {i}:\n        return self.call({i * 37})\n\n"
    for i in range(300)
)
ODD = [
    "", " ", "\n", "  leading and trailing  ", "\n\n\n", "a\n\n  \n\tb\t\t\n", "\r\n\r",
    "\u2581 the space mark \u2581\u2581", "\u2581", "\u2585 \u2047", "\x00nul\x00", "\ufeffbom",
    "e\u0301 is not \u00e9, \ufb01 is no fi, \uff21", "\U0001f600\U0010ffff", "\x85\u2028\x0b\x1f",
    "<s></s><unk><0x0A>", "\ufffd", "日本語 עברית", "a" * 5000,
]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
  folder = tmp_path_factory.mktemp("tokenizer")
  (folder / "text.txt").write_text(TEXT)
  return DataConfig(
      path=str(folder / "text.txt"), cache_dir=str(folder / "cache"), vocab_size=400
  )


@pytest.fixture(scope="module")
def trained(config) -> tokenizer.Tokenizer:
  return tokenizer.load_tokenizer(config, sources.split(config)[0])


@pytest.fixture(scope="module", params=["trained", "bytes"])
def either(request, trained) -> tokenizer.Tokenizer:
  return trained if request.param == "trained" else tokenizer.ByteTokenizer()


@pytest.mark.parametrize("text", [*ODD, TEXT])
def test_round_trip_is_exact(either, text):
  ids = either.encode(text)
  assert either.decode(ids) == text
  assert all(0 <= i < either.vocab_size for i in ids)
  assert not {either.bos_id, either.eos_id} & {*ids}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(trained, text):
  assert trained.decode(trained.encode(text)) == text


def test_a_batch_is_the_texts_one_by_one(either):
  assert either.encode_batch([*ODD, TEXT]) == [either.encode(text) for text in [*ODD, TEXT]]
  assert either.encode_batch([]) == []


def test_control_and_unknown_ids_give_no_text(either):
  ids = either.encode("two words")
  ids = [either.bos_id, *ids, either.vocab_size, 10**6, -1, either.eos_id]
  assert either.decode(ids) == "two words"


def test_bytes_that_are_no_text_give_the_replacement_character(trained):
  assert tokenizer.ByteTokenizer().decode([0x61, 0xE2, 0x96]) == "a\ufffd"
  first_bytes_of_three = trained.encode("\u2603")[:2]
  assert "\ufffd" in trained.decode(first_bytes_of_three)


def test_trained_pieces(trained):
  assert trained.vocab_size == 400
  assert (trained.bos_id, trained.eos_id) == (1, 2)
  assert len(trained.encode(" " * 8)) == 1
  assert len(TEXT) / len(trained.encode(TEXT)) > 4


def test_training_is_deterministic_and_cached(config, trained, tmp_path, monkeypatch):
  train_source = sources.split(config)[0]
  other = DataConfig(path=config.path, cache_dir=str(tmp_path), vocab_size=400)
  assert tokenizer.load_tokenizer(other, train_source).fingerprint == trained.fingerprint
  smaller = DataConfig(path=config.path, cache_dir=str(tmp_path), vocab_size=350)
  assert tokenizer.load_tokenizer(smaller, train_source).vocab_size == 350
  assert len(list((tmp_path / "tokenizers").iterdir())) == 2  # and nothing half written

  monkeypatch.setattr(tokenizer, "train_sentencepiece", None)
  assert tokenizer.load_tokenizer(other, train_source).fingerprint == trained.fingerprint


def test_training_says_nothing(config, tmp_path, capfd):
  tokenizer.train_sentencepiece([TEXT], 400, tmp_path / "x.model")
  assert capfd.readouterr() == ("", "")


def test_sample_is_even_and_bounded(monkeypatch):
  monkeypatch.setattr(tokenizer_training, "_SAMPLE_BYTES", 100_000)
  texts = [f"{number:04}\n" * 2000 for number in range(100)]
  sample = tokenizer_training._sample(texts)
  assert 50_000 < sum(len(chunk.encode()) for chunk in sample) <= 100_000
  counts = np.histogram([int(chunk[:4]) for chunk in sample], bins=5, range=(0, 100))[0]
  assert counts.max() - counts.min() <= 1
  assert "".join(tokenizer_training._chunks(TEXT + "x" * 9000)) == TEXT + "x" * 9000


def test_save_and_load(either, tmp_path):
  either.save(tmp_path / "run")
  loaded = tokenizer.load_saved_tokenizer(tmp_path / "run")
  assert type(loaded) is type(either)
  assert loaded.fingerprint == either.fingerprint
  assert loaded.encode("a b\n") == either.encode("a b\n")


def test_a_model_file_by_its_path(config, trained, tmp_path):
  tokenizer.train_sentencepiece([TEXT], 400, tmp_path / "own.model")
  source = sources.split(config)[0]
  named = DataConfig(path=config.path, tokenizer=str(tmp_path / "own.model"))
  assert tokenizer.load_tokenizer(named, source).vocab_size == 400


def test_other_models_work_as_they_are(tmp_path):
  """A model without bos and byte fallback, and with a dummy prefix, is used unchanged."""
  prefix = tmp_path / "other"
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(prefix), vocab_size=80,
      bos_id=-1, model_type="unigram", hard_vocab_limit=False, minloglevel=2,
  )
  other = tokenizer.SentencePieceTokenizer((tmp_path / "other.model").read_bytes())
  assert other.bos_id == other.eos_id
  assert other.decode(other.encode("return value")) == "return value"
  marked = "return \u2581 value"
  assert other.encode_batch([marked]) == [other.encode(marked)]


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_a_bad_model_file_is_named(config, tmp_path, content):
  path = tmp_path / "x.model"
  if content is not None:
    path.write_bytes(content)
  named = DataConfig(path=config.path, tokenizer=str(path))
  message = r"^config\.data\.tokenizer = '.*x\.model' is not valid: expected \"train\", \"bytes\""
  with pytest.raises(InputError, match=message):
    tokenizer.load_tokenizer(named, sources.split(config)[0])


@pytest.mark.parametrize(
    "text, vocab_size, message",
    [
        ("just a few words\n" * 10, 4096, r"= 4096 is not valid: expected an integer <= \d+"),
        ("".join(map(chr, range(0x4E00, 0x5000))), 300, r"= 300 .*expected an integer >= 7\d\d"),
        ("\n", 300, r"= 300 is not valid: expected a size that SentencePiece can train"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text_is_named(tmp_path, text, vocab_size, message):
  with pytest.raises(InputError, match=r"^config\.data\.vocab_size " + message):
    tokenizer.train_sentencepiece([text], vocab_size, tmp_path / "x.model")
  assert not list(tmp_path.iterdir())


def test_nothing_saved_is_named(tmp_path):
  with pytest.raises(InputError, match=r"no tokenizer in .*expected tokenizer\.json or tok"):
    tokenizer.load_saved_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text('{"dense_jax_tokenizer": "sentencepiece"}')
  with pytest.raises(InputError, match=r"^saved tokenizer = .*tokenizer\.model"):
    tokenizer.load_saved_tokenizer(tmp_path)


# Trains or encodes until a signal's handler raises.
BUSY = """
import io, signal, sys, time
from dense_jax.data import tokenizer

def heard(*_):
  print("heard", flush=True)
  sys.exit(7)

signal.signal(signal.SIGTERM, heard)
text = "".join(f"{n}: a line of words, {n * n}, {n**3} and others\\n" for n in range(200_000))
if sys.argv[1] == "train":
  print("busy", flush=True)
  tokenizer.train_sentencepiece([text], 20_000, None)
else:
  with open(sys.argv[2], "rb") as file:
    model = tokenizer.SentencePieceTokenizer(file.read())
  print("busy", flush=True)
  model.encode(text * 4) if sys.argv[1] == "encode" else model.encode_batch([text * 4])
"""


@pytest.mark.parametrize("what", ["train", "encode", "encode_batch"])
def test_signals_are_heard_while_sentencepiece_works(trained, tmp_path, what):
  trained.save(tmp_path)
  busy = subprocess.Popen(
      [sys.executable, "-c", BUSY, what, str(tmp_path / "tokenizer.model")], cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )
  assert busy.stdout.readline() == "busy\n"
  time.sleep(1.0)
  sent = time.monotonic()
  busy.send_signal(signal.SIGTERM)
  assert busy.stdout.readline() == "heard\n"
  assert time.monotonic() - sent < 2
  _, errors = busy.communicate(timeout=20)
  assert (busy.returncode, errors) == (7, "")


def _children(process) -> list[int]:
  found = subprocess.run(
      ["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False
  )
  return [int(pid) for pid in found.stdout.split()]


def test_a_killed_process_leaves_no_trainer(tmp_path):
  busy = subprocess.Popen(
      [sys.executable, "-c", BUSY, "train"], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  assert busy.stdout.readline() == "busy\n"
  while not (children := _children(busy.pid)):
    assert busy.poll() is None
    time.sleep(0.05)
  time.sleep(0.5)
  busy.kill()
  busy.communicate()
  deadline = time.monotonic() + 10
  while any(pathlib.Path(f"/proc/{child}").exists() for child in children):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_a_trainer_that_fails_is_no_fault_of_the_text(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizer_training.sys, "executable", "/bin/false")
  with pytest.raises(RuntimeError, match="ended with status 1"):
    tokenizer.train_sentencepiece([TEXT * 40], 400, tmp_path / "x.model")  # More than a pipe holds.
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [
    b'{"dense_jax_tokenizer": "sentenc', b"[]", b'"dense_jax_tokenizer"', b"3",
    b'{"dense_jax_tokenizer": null}', b'{"dense_jax_tokenizer": ["bytes"]}',
    b'{"dense_jax_tokenizer": "words"}', b"\xff\xfe", b"", b"[" * 10**5,
    b'{"dense_jax_tokenizer": ' + b"9" * 5000 + b"}",
])
def test_a_damaged_description_is_named(tmp_path, content):
  (tmp_path / "tokenizer_config.json").write_bytes(content)
  with pytest.raises(InputError, match=r"tokenizer_config\.json is not "):
    tokenizer.load_saved_tokenizer(tmp_path)


@pytest.mark.parametrize(("described", "expected"), [
    (None, True), ("{}", True), ('{"add_bos_token": false}', False),
])
def test_a_folder_of_other_tools_says_if_bos_goes_first(trained, tmp_path, described, expected):
  """A model that is trained here sees bos in any case, and what it saves says so."""
  (tmp_path / "tokenizer.model").write_bytes(trained.model)
  if described is not None:
    (tmp_path / "tokenizer_config.json").write_text(described)
  loaded = tokenizer.load_saved_tokenizer(tmp_path)
  assert (loaded.fingerprint, loaded.add_bos) == (trained.fingerprint, expected)
  loaded.save(tmp_path / "again")
  assert tokenizer.load_saved_tokenizer(tmp_path / "again").add_bos == expected
  for name in (tmp_path, tmp_path / "again"):
    assert tokenizer.load_tokenizer(DataConfig(tokenizer=str(name)), None).add_bos


def test_a_runs_folder_names_its_tokenizer(either, tmp_path):
  either.save(tmp_path / "run" / "tokenizer")
  loaded = tokenizer.load_tokenizer(DataConfig(tokenizer=str(tmp_path / "run")), None)
  assert (type(loaded), loaded.fingerprint) == (type(either), either.fingerprint)
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match=r"^config\.data\.tokenizer = '.*empty' .*no tokenizer in"):
    tokenizer.load_tokenizer(DataConfig(tokenizer=str(tmp_path / "empty")), None)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  (tmp_path / "tokenizer.json").write_text("{}")
  for load in (
      lambda: tokenizer.load_saved_tokenizer(tmp_path),
      lambda: tokenizer.load_tokenizer(
          DataConfig(tokenizer=str(tmp_path / "tokenizer.json")), None),
  ):
    with pytest.raises(InputError, match=r"needs the package tokenizers: pip install .*\[hf\]"):
      load()
