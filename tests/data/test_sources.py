"""Finding, reading and splitting text."""

import gzip
import io
import json
import re
from pathlib import Path

import pytest
import zstandard

from dense_jax.config import DataConfig
from dense_jax.data import sources
from dense_jax.errors import InputError


def _jsonl(*texts: str) -> bytes:
  return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def _texts(source: sources.TextSource) -> list[str]:
  return [document.text for document in source]


def _config(path: Path | str, **values) -> DataConfig:
  return DataConfig(path=str(path), **values)


def test_reads_every_format_as_it_stands(tmp_path):
  (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ttwo  \n\n".encode())
  (tmp_path / "b.jsonl").write_bytes(_jsonl("b1", "b2\n") + b"  \n" + _jsonl("", "b3"))
  (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(_jsonl("c1")))
  frames = [zstandard.compress(_jsonl(text)) for text in ("d1", "d2")]
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "d.jsonl.zst").write_bytes(b"".join(frames))
  (tmp_path / "notes.md").write_text("of another suffix: passed over in a directory")

  source = sources.find(str(tmp_path), "config.data.path")
  assert [(d.name, d.text) for d in source] == [
      ("a.txt", "\ufeffone\r\n\ttwo  \n\n"),
      ("b.jsonl:1", "b1"), ("b.jsonl:2", "b2\n"), ("b.jsonl:5", "b3"),
      ("c.jsonl.gz:1", "c1"),
      ("sub/d.jsonl.zst:1", "d1"), ("sub/d.jsonl.zst:2", "d2"),
  ]
  assert list(source) == list(source)


def test_glob_and_single_file(tmp_path):
  for name in ("x1.txt", "x2.txt", "y.txt"):
    (tmp_path / name).write_text(name)
  assert _texts(sources.find(str(tmp_path / "x*.txt"), "f")) == ["x1.txt", "x2.txt"]
  assert _texts(sources.find(str(tmp_path / "y.txt"), "f")) == ["y.txt"]


def test_what_is_not_utf8_becomes_the_replacement_character(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"caf\xe9!")
  (tmp_path / "b.jsonl").write_bytes(rb'{"text": "half \ud800 pair"}')
  texts = _texts(sources.find(str(tmp_path), "f"))
  assert texts[0] == "caf\ufffd!"
  assert re.fullmatch("half \ufffd+ pair", texts[1])
  assert all(text.encode().decode() == text for text in texts)


def test_stdlib_is_the_library_without_its_tests():
  source = sources.find("stdlib", "config.data.path")
  names = [file.relative_to(source.root).as_posix() for file in source.files]
  assert names == sorted(names)
  assert "json/decoder.py" in names
  assert not [name for name in names if {"test", "tests", "site-packages"} & {*name.split("/")}]
  assert 5e6 < sum(file.stat().st_size for file in source.files) < 40e6


def test_split_holds_out_every_nth_file(tmp_path):
  for number in range(7):
    (tmp_path / f"{number}.txt").write_text(f"text {number}")
  train, heldout = sources.split(_config(tmp_path, heldout_every=3))
  assert _texts(heldout) == ["text 0", "text 3", "text 6"]
  assert _texts(train) == ["text 1", "text 2", "text 4", "text 5"]


def test_split_holds_out_every_nth_document_of_few_files(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(_jsonl("0", "", "1", "2", "3", "4"))
  train, heldout = sources.split(_config(tmp_path / "a.jsonl", heldout_every=4))
  assert _texts(heldout) == ["0", "4"]
  assert _texts(train) == ["1", "2", "3"]


def test_split_holds_out_the_end_of_few_documents(tmp_path):
  lines = [f"line {number}\n" for number in range(100)]
  (tmp_path / "a.jsonl").write_bytes(_jsonl("".join(lines), "x" * 50))
  train, heldout = sources.split(_config(tmp_path / "a.jsonl", heldout_every=10))
  assert _texts(train) == ["".join(lines[:90]), "x" * 45]
  assert _texts(heldout) == ["".join(lines[90:]), "x" * 5]


def test_split_cuts_at_the_nearest_line():
  part = sources.Part("text", 4, heldout=True)
  assert part.take(0, "aaaa\nbbbbbbbbb\ncc") == "cc"
  assert part.take(0, "a\n" + "b" * 20) == "b" * 20
  assert part.take(0, "b" * 20) == "b" * 5


def test_split_with_a_heldout_path(tmp_path):
  (tmp_path / "a.txt").write_text("train")
  (tmp_path / "b.txt").write_text("held out")
  train, heldout = sources.split(
      _config(tmp_path / "a.txt", heldout_path=str(tmp_path / "b.txt"))
  )
  assert (_texts(train), _texts(heldout)) == (["train"], ["held out"])
  with pytest.raises(InputError, match=r"config\.data\.heldout_path = .*not in config\.data\.path"):
    sources.split(_config(tmp_path, heldout_path=str(tmp_path / "b.txt")))


def test_fingerprint_is_of_the_content_and_the_part_not_of_the_place(tmp_path):
  prints = set()
  for place, text, every in (("a", "one\ntwo\n", 2), ("b", "one\nTWO\n", 2), ("a", "", 3)):
    (tmp_path / place).mkdir(exist_ok=True)
    if text:
      (tmp_path / place / "x.txt").write_text(text)
    for part in sources.split(_config(tmp_path / place, heldout_every=every)):
      prints.add(part.fingerprint)
  assert len(prints) == 6

  (tmp_path / "c").mkdir()
  (tmp_path / "c" / "x.txt").write_text("one\ntwo\n")
  first, second = (sources.split(_config(tmp_path / p, heldout_every=2)) for p in "ac")
  assert [s.fingerprint for s in first] == [s.fingerprint for s in second]


def test_reading_stops_where_the_reader_stops(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(_jsonl("one", "two") + b"this line is not JSON\n")
  documents = iter(sources.find(str(tmp_path), "f"))
  assert (next(documents).text, next(documents).text) == ("one", "two")
  with pytest.raises(InputError):
    next(documents)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, r"missing\.txt' is not valid: expected \"stdlib\".*no such file"),
        ("a.csv", b"1,2", r"a\.csv' .*\.jsonl\.zst; a\.csv has another suffix"),
        ("a.txt", b"", r"a\.txt' .*files with text; the training part of it is empty"),
        ("a.jsonl", _jsonl(""), r"a\.jsonl' .*files with text"),
        ("a.txt", b"x", r"a\.txt' .*the held-out part of it is empty"),
        ("a.jsonl", _jsonl("1") + b"{\n", r'a\.jsonl\' .*string "text".*line 2 is b\'\{'),
        ("a.jsonl", b'{"content": "x"}\n', r'string "text" in every line; line 1 is '),
        ("a.jsonl", b'{"text": 3}\n', r'string "text" in every line; line 1 is '),
        ("a.jsonl", b"[1]\n", r'string "text" in every line; line 1 is '),
        ("a.jsonl", b'{"text": "\xff"}\n', r'string "text" in every line; line 1 is '),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz' .*a file that can be read"),
        ("a.jsonl.gz", gzip.compress(_jsonl("x"), mtime=0)[:-9], r"gz' .*a file that can be read"),
        ("a.jsonl.zst", b"not zstd at all", r"zst' .*a file that can be read"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=r"^config\.data\.path = '.*" + message):
    for part in sources.split(_config(tmp_path / name)):
      list(part)


def test_a_bad_heldout_path_is_named(tmp_path):
  (tmp_path / "a.txt").write_text("train")
  (tmp_path / "empty.txt").write_text("")
  for name in ("none.txt", "empty.txt"):
    with pytest.raises(InputError, match=rf"^config\.data\.heldout_path = '.*{name}' is not valid"):
      sources.split(_config(tmp_path / "a.txt", heldout_path=str(tmp_path / name)))


def test_memory_holds_a_line_and_not_the_file(tmp_path, monkeypatch):
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl(*["x" * 1000] * 1000)))
  read = []
  plain = io.BufferedReader.__next__

  class Counting(io.BufferedReader):
    def __next__(self):
      read.append(1)
      return plain(self)

  monkeypatch.setattr(io, "BufferedReader", Counting)
  next(iter(sources.find(str(tmp_path), "f")))
  assert len(read) == 1
