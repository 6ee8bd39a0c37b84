"""The token store and its windows."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_jax.data import packing, sources
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


def _source(folder, texts) -> sources.TextSource:
  folder.mkdir(exist_ok=True, parents=True)
  lines = [json.dumps({"text": text}) for text in texts]
  (folder / "a.jsonl").write_text("\n".join(lines))
  return sources.find(str(folder), "config.data.path")


def _build(tmp_path, texts, **options) -> packing.TokenStore:
  source = _source(tmp_path / "text", texts)
  return packing.build_store(source, ByteTokenizer(), str(tmp_path / "cache"), **options)


def _in_memory(lengths: list[int]) -> packing.TokenStore:
  """Makes a store of documents of the given lengths; each token is its index in the stream."""
  starts = np.cumsum([0, *lengths])
  return packing.TokenStore(
      tokens=np.arange(starts[-1], dtype=np.uint16),
      starts=starts[:-1],
      document_bytes=np.array(lengths),
      fingerprint="x",
  )


def test_the_stream(tmp_path):
  done = []
  store = _build(tmp_path, ["ab", "é"], progress=done.append)
  expected = [BOS, 97, 98, EOS, BOS, 0xC3, 0xA9, EOS]
  np.testing.assert_array_equal(store.tokens, expected)
  assert store.tokens.dtype == np.uint16
  np.testing.assert_array_equal(store.starts, [0, 4])
  np.testing.assert_array_equal(store.document_bytes, [2, 2])
  assert (store.num_tokens, store.num_documents, store.num_bytes) == (8, 2, 4)
  assert store.num_targets == 6
  assert done == [4]


def test_a_worked_example():
  store = _in_memory([4, 3, 5])  # documents at 0, 4, 7; 12 tokens
  assert store.num_windows(5) == 3
  rows = [store.row(index, 5) for index in range(3)]
  expected = {
      "tokens": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 0, 0, 0, 0]],
      "targets": [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 0, 0, 0, 0]],
      "loss_mask": [[1, 1, 1, 0, 1], [1, 0, 1, 1, 1], [1, 0, 0, 0, 0]],
      "segment_ids": [[1, 1, 1, 1, 2], [1, 1, 2, 2, 2], [1, 0, 0, 0, 0]],
      "positions": [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2], [0, 0, 0, 0, 0]],
  }
  for name, values in expected.items():
    stacked = np.stack([row[name] for row in rows])
    np.testing.assert_array_equal(stacked, values, err_msg=name)
    assert stacked.dtype == (bool if name == "loss_mask" else np.int32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=20), st.integers(1, 40))
def test_every_token_but_bos_is_a_target_exactly_once(lengths, seq_len):
  store = _in_memory(lengths)
  seen = np.zeros(store.num_tokens, int)
  for index in range(store.num_windows(seq_len)):
    row = store.row(index, seq_len)
    assert all(column.shape == (seq_len,) for column in row.values())
    np.add.at(seen, row["targets"][row["loss_mask"]], 1)
    document = np.searchsorted(store.starts, row["tokens"], side="right")
    real = row["segment_ids"] > 0
    # Padding is a suffix of the last window only, and all zeros.
    assert real[0] and np.all(real[:-1] >= real[1:])
    assert real.all() or index == store.num_windows(seq_len) - 1
    for name, column in row.items():
      assert not column[~real].any(), name
    # Segments are documents, numbered from 1; positions count from a segment's start in the window.
    np.testing.assert_array_equal(row["segment_ids"][real], (document - document[0] + 1)[real])
    start = np.maximum(store.starts[document - 1], index * seq_len)
    np.testing.assert_array_equal(row["positions"][real], (row["tokens"] - start)[real])
    # The input of a counted target is the token before it, of the same document.
    counted = row["loss_mask"]
    np.testing.assert_array_equal(row["tokens"][counted] + 1, row["targets"][counted])
  expected = np.ones(store.num_tokens, int)
  expected[store.starts] = 0
  np.testing.assert_array_equal(seen, expected)
  assert seen.sum() == store.num_targets


def test_real_text_comes_back_from_the_targets(tmp_path):
  texts = ["first document\n", "x", "the third one, longer than a window " * 5]
  store = _build(tmp_path, texts)
  counted = []
  for index in range(store.num_windows(16)):
    row = store.row(index, 16)
    counted += row["targets"][row["loss_mask"]].tolist()
  assert ByteTokenizer().decode(counted) == "".join(texts)
  assert counted.count(EOS) == 3 and BOS not in counted


@pytest.mark.parametrize("index", [-1, 3])
def test_no_such_window(index):
  with pytest.raises(IndexError, match="of 3"):
    _in_memory([4, 3, 5]).row(index, 5)


def test_batches_of_documents_do_not_show(tmp_path, monkeypatch):
  texts = [f"document {number}" for number in range(50)]
  whole = _build(tmp_path / "a", texts)
  monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 40)
  done = []
  parts = _build(tmp_path / "b", texts, progress=done.append)
  np.testing.assert_array_equal(whole.tokens, parts.tokens)
  np.testing.assert_array_equal(whole.starts, parts.starts)
  assert len(done) > 5 and done == sorted(done) and done[-1] == whole.num_bytes


def test_large_vocabularies_take_four_bytes(tmp_path):
  class Large(ByteTokenizer):
    vocab_size = 70_000
    eos_id = 69_999
    fingerprint = "large"

  source = _source(tmp_path / "text", ["a"])
  store = packing.build_store(source, Large(), str(tmp_path / "cache"))
  assert store.tokens.dtype == np.uint32
  assert store.tokens.tolist() == [BOS, 97, 69_999]


def test_the_cache_is_used_and_keyed(tmp_path):
  done = []
  first = _build(tmp_path, ["ab"], progress=done.append)
  second = _build(tmp_path, ["ab"], progress=done.append)
  assert len(done) == 1 and first.fingerprint == second.fingerprint
  third = _build(tmp_path, ["cd"], progress=done.append)
  assert len(done) == 2 and third.fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["tokens.bin", "starts.bin", "meta.json", "missing", "junk"])
def test_a_store_that_is_not_whole_is_never_taken(tmp_path, damage):
  store = _build(tmp_path, ["some text", "more"])
  expected = store.tokens.tolist()
  folder = tmp_path / "cache" / "tokens" / store.fingerprint
  if damage == "missing":
    (folder / "document_bytes.bin").unlink()
  elif damage == "junk":
    (folder / "meta.json").write_text('{"dtype": "nonsense", "tokens": 1, "documents": 1}')
  else:
    os.truncate(folder / damage, (folder / damage).stat().st_size - 1)
  done = []
  assert _build(tmp_path, ["some text", "more"], progress=done.append).tokens.tolist() == expected
  assert done


def test_an_error_leaves_nothing(tmp_path):
  source = _source(tmp_path / "text", ["ab"])
  with (tmp_path / "text" / "a.jsonl").open("a") as file:
    file.write("\nnot JSON\n")
  with pytest.raises(InputError, match="line 2"):
    packing.build_store(source, ByteTokenizer(), str(tmp_path / "cache"))
  assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path):
  texts = ["a document", "another"]
  _source(tmp_path / "text", texts)
  script = textwrap.dedent(f"""
      import os, signal
      from dense_jax.data import packing, sources
      from dense_jax.data.tokenizer import ByteTokenizer
      packing._BATCH_CHARACTERS = 1
      packing.build_store(
          sources.find({str(tmp_path / "text")!r}, "config.data.path"), ByteTokenizer(),
          {str(tmp_path / "cache")!r}, lambda done: os.kill(os.getpid(), signal.SIGKILL))
  """)
  killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
  assert killed.returncode == -signal.SIGKILL
  left = list((tmp_path / "cache" / "tokens").iterdir())
  assert left and all(path.suffix == ".partial" for path in left)
  assert _build(tmp_path, texts).num_bytes == len("".join(texts))


def test_the_second_of_two_writers_takes_the_first_ones_store(tmp_path):
  source = _source(tmp_path / "text", ["ab"])

  def interrupt(done):  # Another process finishes first.
    packing.build_store(source, ByteTokenizer(), str(tmp_path / "cache"))

  store = packing.build_store(source, ByteTokenizer(), str(tmp_path / "cache"), interrupt)
  assert store.tokens.tolist() == [BOS, 97, 98, EOS]
  assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_text_without_a_document_is_named(tmp_path):
  with pytest.raises(InputError, match=r"^config\.data\.path = .*files with text; all of them"):
    _build(tmp_path, ["", ""])
  assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "cache").write_text("a file")
  with pytest.raises(InputError, match=r"^config\.data\.cache_dir = .*a directory that can be"):
    _build(tmp_path, ["ab"])
