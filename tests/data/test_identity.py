"""Descriptions of a run's data, and explanations of how other data differ."""

import json
import shutil

import pytest

from dense_jax.config import DataConfig
from dense_jax.data import identity, pipeline

BASE = {"a.txt": "a" * 1000, "notes/b.txt": "b" * 1204, "c.txt": "c" * 30, "d.txt": "d" * 30}


@pytest.fixture
def describe(tmp_path):
  """Returns a function that writes files and returns the description, read back from JSON."""

  def described(files, folder="text", **values):
    shutil.rmtree(tmp_path / folder, ignore_errors=True)
    for name, content in files.items():
      (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / folder / name).write_text(content)
    config = DataConfig(**{"path": str(tmp_path / folder), "tokenizer": "bytes",
                           "cache_dir": str(tmp_path / "cache"), **values})
    return json.loads(json.dumps(identity.describe(pipeline.load_datasets(config))))

  return described


def test_the_same_data_elsewhere(describe):
  base = describe(BASE)
  assert base["files"]["config.data.path"]["count"] == 4
  assert base["files"]["config.data.path"]["bytes"] == 2264
  assert [name for name, *_ in base["files"]["config.data.path"]["files"]] == sorted(BASE)
  assert identity.explain_difference(base, base) == []
  assert identity.explain_difference(base, describe(BASE, "moved")) == []
  renamed = {f"{number}.txt": BASE[name] for number, name in enumerate(sorted(BASE))}
  assert identity.explain_difference(base, describe(renamed)) == []


@pytest.mark.parametrize("every", [2, 20])  # Holds out whole files, and parts of each text.
@pytest.mark.parametrize(("change", "lines"), [
    ({"notes/b.txt": "b" * 2000}, ["notes/b.txt has grown from 1,204 to 2,000 bytes"]),
    ({"a.txt": "a" * 999}, ["a.txt has shrunk from 1,000 to 999 bytes"]),
    ({"c.txt": "C" * 30}, ["c.txt has other contents of the same size, 30 bytes"]),
    ({"x.txt": "x", "y.txt": "y", "z.txt": "z"}, ["3 files are new: x.txt, y.txt and z.txt"]),
    ({"x.txt": "x"}, ["1 file is new: x.txt"]),
    ({"a.txt": None, "c.txt": None}, ["2 files are gone: a.txt and c.txt"]),
    ({"a.txt": None, "z.txt": BASE["a.txt"]}, ["a.txt is now named z.txt"]),
    ({"c.txt": BASE["d.txt"], "d.txt": BASE["c.txt"]},
     ["c.txt has other contents of the same size, 30 bytes",
      "d.txt has other contents of the same size, 30 bytes"]),
    ({"c.txt": None, "c.jsonl": '{"text": "c"}'},
     ["1 file is new: c.jsonl", "1 file is gone: c.txt"]),
    ({f"x{n}.txt": str(n) for n in range(7)},
     ["7 files are new: x0.txt, x1.txt, x2.txt, x3.txt, x4.txt and 2 more"]),
])
def test_changes_are_told(describe, every, change, lines):
  base = describe(BASE, heldout_every=every)
  files = {name: text for name, text in {**BASE, **change}.items() if text is not None}
  expected = [f"config.data.path: {line}" for line in lines]
  assert identity.explain_difference(base, describe(files, heldout_every=every)) == expected


def test_many_changes_are_counted(describe):
  base = describe({f"{n}.txt": f"{n}" for n in range(8)}, heldout_every=2)
  more = describe({f"{n}.txt": f"{n}!" for n in range(8)}, heldout_every=2)
  lines = identity.explain_difference(base, more)
  assert lines[4:] == [  # Only the first five are named.
      "config.data.path: 4.txt has grown from 1 to 2 bytes",
      "config.data.path: 3 other files have changed",
  ]


def test_the_same_bytes_read_in_another_way_are_other_data(describe):
  base = describe({**BASE, "x.txt": '{"text": "x"}'})
  now = describe({**BASE, "x.jsonl": '{"text": "x"}'})
  assert identity.explain_difference(base, now) == [
      "config.data.path: x.txt is now named x.jsonl"
  ]


def test_held_out_text_has_its_own_field(describe, tmp_path):
  (tmp_path / "held.txt").write_text("held out")
  values = {"heldout_path": str(tmp_path / "held.txt")}
  base = describe(BASE, **values)
  (tmp_path / "held.txt").write_text("held out, and more")
  now = describe(BASE, **values)
  assert identity.explain_difference(base, now) == [
      "config.data.heldout_path: held.txt has grown from 8 to 18 bytes"
  ]
  assert identity.explain_difference(describe(BASE), now) == [
      "config.data.heldout_path: it named no files when the run began, and names some now"
  ]


def test_parts_and_tokenizers(describe):
  base = describe(BASE, heldout_every=2)
  assert identity.explain_difference(base, describe(BASE, heldout_every=3)) == [
      "config.data: another part of the same text is held out"
  ]
  words = "".join(f"{n}: a line of words, {n * n}, {n**3} and others\n" for n in range(99))
  trained = describe(
      {**BASE, "t.txt": words, "u.txt": words}, tokenizer="train", vocab_size=300, heldout_every=2
  )
  assert identity.explain_difference(base, trained) == [
      "config.data.path: 2 files are new: t.txt and u.txt",
      "config.data.tokenizer: the tokenizer is another one than that of the run",
  ]
  assert identity.explain_difference({**base, "fingerprint": "of another format"}, base) == [
      "config.data: another part of the text, or another version of this program tokenized it"
  ]


def test_of_many_files_there_is_a_count(describe, monkeypatch):
  monkeypatch.setattr(identity, "_MOST_FILES", 3)
  base = describe(BASE)
  assert base["files"]["config.data.path"].keys() == {"count", "bytes", "digest"}
  assert identity.explain_difference(base, describe({**BASE, "c.txt": "c"})) == [
      "config.data.path: 4 files of 2,264 bytes are now 4 files of 2,235 bytes"
  ]
  (line,) = identity.explain_difference(base, describe({**BASE, "c.txt": "C" * 30}))
  assert line == "config.data.path: 4 files of 2,264 bytes have other contents"


@pytest.mark.parametrize("damage", [
    lambda d: {}, lambda d: [], lambda d: None, lambda d: "text", lambda d: 3,
    lambda d: {**d, "fingerprint": "x", "texts": 0, "files": None},
    lambda d: {**d, "fingerprint": "x", "texts": 0, "files": {"config.data.path": 3}},
    lambda d: {**d, "fingerprint": "x", "texts": 0, "files": {"config.data.path": {}}},
    lambda d: {"fingerprint": "x"},
    lambda d: {**d, "fingerprint": "x", "texts": 0,
               "files": {"config.data.path": {"files": [["a.txt", "many", 3], 7]}}},
    lambda d: {**d, "fingerprint": "x", "texts": 0,
               "files": {"config.data.path": {"files": [[["a"], {}, 3]]}}},
    lambda d: {**d, "fingerprint": "x", "texts": 0,
               "files": {"config.data.path": {"files": [["a.txt", "many", "x"]]}}},
])
def test_a_damaged_record_is_said(describe, damage):
  base = describe(BASE)
  assert identity.explain_difference(damage(base), base) == [
      "what is written down of the data that the run began with is damaged"
  ]
