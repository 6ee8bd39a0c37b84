"""tokenizer.json files: ids, hard text, special and added tokens, bos, damage."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dense_jax.config import DataConfig
from dense_jax.data import hugging_face_tokenizer, sources
from dense_jax.data.converted import converted_files
from dense_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from dense_jax.data.packing import build_store
from dense_jax.data.spelling import prompt_ids, spell
from dense_jax.data.tokenizer import load_saved_tokenizer, load_tokenizer
from dense_jax.errors import InputError
from tests.data.hugging_face import EOS, TEXT, byte_level, llama

pytestmark = pytest.mark.slow  # The package tokenizers comes with the extra hf.
ROOT = pathlib.Path(__file__).resolve().parents[2]
HARD = [
    "", " ", "\n", "  leading and trailing  ", "a\n\n  \n\tb\t\t\n", "\r\n", "line\r\nline\r\n",
    "lone \r and \r\r", "\ttab\t\t", "\x00nul\x00\x00", "\ufeffbom", "e\u0301 o\u0308\u0323 \u0301",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \U0010ffff",
    "\x85\u2028\x0b\x1f\x7f", "\ufffd", "日本語 עברית हिन्दी", "\u2581 \u2581\u2581", "\u0120\u010a",
    "a" * 10_000, "漢" * 10_000, "ab1_" * 2_500, " " * 10_000, "\n" * 10_000,
]


@pytest.fixture(scope="module")
def plain() -> HuggingFaceTokenizer:
  return HuggingFaceTokenizer(byte_level())


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
  from tokenizers import normalizers

  return {
      "plain": byte_level(),
      "added": byte_level(added=["    ", "\n\n", "naïve", "né", "日本"]),
      "nfc": byte_level(normalizer=normalizers.NFC()),
      "llama": llama(),
  }


STYLES = ["plain", "added", "nfc", "llama"]


@pytest.mark.parametrize("style", ["plain", "added"])
def test_hard_text_comes_back_exactly(files, style):
  ours = HuggingFaceTokenizer(files[style])
  for text in [*HARD, *TEXT[:20], "x né naïve日本 né"]:
    ids = ours.encode(text)
    assert ours.decode(ids) == text, text[:40]
    assert all(0 <= i < ours.vocab_size for i in ids) and ours.eos_id not in ids


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_text_are_the_librarys(files, style):
  from tokenizers import Tokenizer

  ours, theirs = HuggingFaceTokenizer(files[style]), Tokenizer.from_buffer(files[style])
  texts = [*HARD, f"a{EOS}b", "<s>x</s>", TEXT[0]]
  expected = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
  assert ours.encode_batch(texts) == expected == [ours.encode(text) for text in texts]
  assert ours.encode_batch([]) == []
  if style != "added":  # The library garbles "né": it takes it for a spelling of bytes.
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]


@pytest.mark.parametrize("style", STYLES)
def test_a_continuation_is_spelled_at_every_split(files, style):
  """Also of random ids, which hold halves of characters."""
  ours, draw = HuggingFaceTokenizer(files[style]), random.Random(0)
  rows = [ours.encode(text[:60]) for text in HARD]
  rows += [[draw.randrange(ours.vocab_size) for _ in range(9)] for _ in range(100)]
  for ids in rows:
    whole = ours.decode(ids)
    for border in range(len(ids) + 1):
      prompt, new = spell(ours, ids[:border], ids[border:])
      assert prompt + new == whole, (ids, border)
      alone = ours.decode(ids[:border])
      assert alone.startswith(prompt) and set(alone[len(prompt):]) <= {"\ufffd"}


def test_halves_of_a_character(plain):
  ids = plain.encode("a\U0001f600b")
  assert len(ids) == 6
  assert plain.decode(ids[:3]) == "a\ufffd"
  assert spell(plain, ids[:3], ids[3:]) == ("a", "\U0001f600b")


def test_half_a_character_takes_nothing_along(files):
  ours = HuggingFaceTokenizer(files["llama"])
  ids = [3 + byte for byte in "x\n\U0001f600".encode()]
  assert [ours.decode(ids[:n]) for n in range(7)] == [
      "", "x", "x\n", *("x\n" + "\ufffd" * n for n in (1, 2, 3)), "x\n\U0001f600"]
  assert ours.decode([*ids, ids[-1], ids[1]]) == "x\n\U0001f600\ufffd\n"


def test_special_tokens_are_found_in_text_and_give_none(plain):
  ids = plain.encode(f"a{EOS}b")
  assert ids == [*plain.encode("a"), plain.eos_id, *plain.encode("b")]
  assert plain.decode([plain.eos_id, *ids, plain.vocab_size, 10**9, -1]) == "ab"


def test_without_bos_eos_is_the_first_token_and_is_said_to_be_bos(plain):
  described = json.loads(plain.files()["tokenizer_config.json"])
  assert plain.bos_id == plain.eos_id and not plain.add_bos
  assert described == {"bos_token": EOS, "eos_token": EOS, "add_bos_token": False,
                       "dense_jax_tokenizer": "huggingface"}


def test_the_vocabulary_reaches_to_the_greatest_id():
  content = json.loads(byte_level(added=["né"]))
  last = content["added_tokens"][-1]
  tokenizer = HuggingFaceTokenizer(json.dumps(content).encode())
  assert tokenizer.vocab_size == last["id"] + 1 == len(content["model"]["vocab"]) + 1
  assert tokenizer.encode("né") == [last["id"]]


@pytest.mark.parametrize(("settings", "bos", "eos", "adds"), [
    ({}, "<s>", "</s>", True),  # As the post-processor does.
    ({"add_bos_token": False}, "<s>", "</s>", False),
    ({"bos_token": None, "eos_token": {"content": "<s>"}}, "<s>", "<s>", True),
    ({"eos_token": "→", "bos_token": "</s>"}, "</s>", "→", False),
])
def test_the_description_says_which_tokens_are_bos_and_eos(files, settings, bos, eos, adds):
  ours = HuggingFaceTokenizer(files["llama"], settings)
  ids = [ours.encode(name)[-1] for name in ("<s>", "</s>")]
  assert dict(zip(("<s>", "</s>"), ids, strict=True)).get(bos) == ours.bos_id
  assert eos == "→" or dict(zip(("<s>", "</s>"), ids, strict=True))[eos] == ours.eos_id
  assert ours.add_bos == adds
  assert ours.decode([ours.bos_id, *ours.encode("a b"), ours.eos_id]) == "a b"
  expected = ours.encode("x")
  assert prompt_ids(ours, "x") == ([ours.bos_id, *expected] if adds else expected)
  assert prompt_ids(ours, "") == [ours.bos_id]


@pytest.mark.parametrize("place", ["folder", "file", "folder with special_tokens_map.json"])
def test_a_folder_of_other_tools(files, tmp_path, place):
  (tmp_path / "tokenizer.json").write_bytes(files["llama"])
  (tmp_path / "tokenizer.model").write_bytes(b"not read where there is a tokenizer.json")
  names = {"bos_token": "</s>", "eos_token": {"content": "<s>"}}
  config = {"chat_template": "{{ x }}", "tokenizer_class": "LlamaTokenizerFast"}
  if "map" in place:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**names, "pad_token": 3}))
  else:
    config |= names
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  saved = load_saved_tokenizer(tmp_path)
  assert (saved.bos_id, saved.eos_id, saved.add_bos) == (2, 1, False)
  path = tmp_path / "tokenizer.json" if place == "file" else tmp_path
  trained = load_tokenizer(DataConfig(tokenizer=str(path)), None)
  assert trained.add_bos and trained.fingerprint == saved.fingerprint
  trained.save(tmp_path / "run")
  for name, content in converted_files(trained).items():
    (tmp_path / "run" / name).write_bytes(content)
  again = load_saved_tokenizer(tmp_path / "run")
  assert (again.fingerprint, again.add_bos) == (saved.fingerprint, True)
  assert (tmp_path / "run" / "tokenizer.json").read_bytes() == files["llama"]
  written = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
  assert written == {
      **config, "bos_token": "</s>", "eos_token": "<s>", "add_bos_token": True,
      "add_eos_token": False, "dense_jax_tokenizer": "huggingface",
  }


def test_a_file_of_another_name_is_not_described_by_its_neighbours(files, tmp_path):
  (tmp_path / "mine.json").write_bytes(files["llama"])
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "nothing"}')
  loaded = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "mine.json")), None)
  assert (loaded.bos_id, loaded.eos_id) == (1, 2)


def test_truncation_padding_and_dropout_are_not_obeyed(plain, tmp_path):
  from tokenizers import Tokenizer

  other = Tokenizer.from_buffer(plain.content)
  other.enable_truncation(2)
  other.enable_padding(length=9)
  other.model.dropout = 0.9
  ours = HuggingFaceTokenizer(other.to_str().encode())
  texts = ["a", "return self.call value"]
  assert ours.encode_batch(texts) == plain.encode_batch(texts)


@pytest.mark.parametrize("style", STYLES)
def test_long_texts_are_cut_where_it_does_not_show(files, style, monkeypatch):
  ours = HuggingFaceTokenizer(files[style])
  lines = "".join(TEXT)
  text = lines + "\n" * 50 + "x" * 3000 + "\nY" + lines.replace("\n", "\n ") + lines.split("\n")[0]
  text += "  " + lines.replace("\n", " ") + "\r\n".join(TEXT)
  whole = ours.encode(text)
  assert whole == ours._tokenizer.encode(text, add_special_tokens=False).ids
  monkeypatch.setattr(hugging_face_tokenizer, "_PIECE", 500)
  monkeypatch.setattr(hugging_face_tokenizer, "_AT_A_TIME", 2000)
  pieces = list(ours._pieces(text))
  assert "".join(pieces) == text and (len(pieces) > 40) == (style != "llama")
  assert ours.encode_batch([text, "", "a b", text]) == [whole, [], ours.encode("a b"), whole]


def _broken(content: bytes) -> dict[str, bytes]:
  whole = json.loads(content)
  return {
      "empty": b"", "cut": content[: len(content) // 2], "list": b"[]", "deep": b"[" * 10**5,
      "binary": b"\xff\xfe\x00", "description": b'{"dense_jax_tokenizer": "bytes"}',
      "model": json.dumps({**whole, "model": {"type": "XYZ"}}).encode(),
      "decoder": json.dumps({**whole, "decoder": {"type": "XYZ"}}).encode(),
      "merges": json.dumps({**whole, "model": {**whole["model"], "merges": ["q1 q2"]}}).encode(),
      "ids": json.dumps({**whole, "model": {**whole["model"], "vocab": {"a": -1}}}).encode(),
      "no eos": json.dumps({**whole, "added_tokens": []}).encode(),
  }


def test_a_damaged_file_is_named(plain, tmp_path):
  path = tmp_path / "tokenizer.json"
  for what, content in _broken(plain.content).items():
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"^config\.data\.tokenizer = .*tokenizer\.json") as error:
      load_tokenizer(DataConfig(tokenizer=str(path)), None)
    assert ("no eos token" in str(error.value)) == (what == "no eos"), what
    with pytest.raises(InputError, match=r"^saved tokenizer = .*tokenizer\.json"):
      load_saved_tokenizer(tmp_path)
  path.write_bytes(plain.content)
  for values in ({"eos_token": "nothing"}, {"eos_token": 3}, {"eos_token": {}}):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="eos_token"):
      load_saved_tokenizer(tmp_path)


def test_text_that_it_has_no_tokens_for_is_named():
  from tokenizers import Tokenizer, models

  words = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
  words.add_special_tokens(["</s>"])
  ours = HuggingFaceTokenizer(words.to_str().encode())
  with pytest.raises(InputError, match=r"cannot encode this text.*'a b'"):
    ours.encode("a b")


def test_bytes_are_those_of_the_text(files, tmp_path):
  """A normalizer changes the ids, not the bytes that bits per byte divides by."""
  texts = [text for text in HARD if text]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  source = sources.find(str(tmp_path / "a.jsonl"), "config.data.path")
  for style in STYLES:
    ours = HuggingFaceTokenizer(files[style])
    store = build_store(source, ours, str(tmp_path / "cache"))
    sizes = [len(text.encode()) for text in texts]
    np.testing.assert_array_equal(store.document_bytes, sizes)
    ids = [ours.encode(text) for text in texts]
    stream = [i for row in ids for i in (ours.bos_id, *row, ours.eos_id)]
    np.testing.assert_array_equal(store.tokens, stream)
    targets = sum(len(row) + 1 for row in ids)
    assert store.targets_per_byte == targets / sum(sizes)


BUSY = """
import signal, sys
from dense_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer

def heard(*_):
  print("heard", flush=True)
  sys.exit(7)

signal.signal(signal.SIGTERM, heard)
text = "".join(f"{n}: a line of words, {n * n}, {n**3} and others\\n" for n in range(200_000))
with open(sys.argv[1], "rb") as file:
  model = HuggingFaceTokenizer(file.read())
print("busy", flush=True)
model.encode_batch([text * 4] * 2)
"""


def test_signals_are_heard_while_the_library_works(plain, tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(plain.content)
  busy = subprocess.Popen(
      [sys.executable, "-c", BUSY, str(tmp_path / "tokenizer.json")], cwd=ROOT,
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
