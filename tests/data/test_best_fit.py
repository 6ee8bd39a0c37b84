"""Rows packed best fit: every target once, whole documents, little padding."""

import pickle

import numpy as np
import pytest

from dense_jax.config import DataConfig
from dense_jax.data import best_fit as module
from dense_jax.data.best_fit import best_fit, pack
from dense_jax.data.packing import TokenStore
from dense_jax.data.pipeline import rows_to_train, without_target
from dense_jax.data.row_store import JoinedRows
from dense_jax.errors import InputError

T = 16


def _store(lengths, offset=0) -> TokenStore:
  """Makes a store of documents of these lengths; each token is its index in the stream."""
  starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
  return TokenStore(
      np.arange(sum(lengths), dtype=np.uint32) + np.uint32(offset), starts,
      np.asarray(lengths), f"store of {lengths} {offset}",
  )


def test_pieces_go_where_they_fit_best():
  """By hand: 10 and 9 begin rows, 7 fits the second, 6 the first exactly, and 4 begins one."""
  assert pack(np.array([7, 4, 10, 6, 9]), 16) == [[2, 3], [4, 0], [1]]
  assert pack(np.array([16, 1, 15]), 16) == [[0], [2, 1]]


def test_a_row_of_any_length_costs_no_more_than_its_text():
  """Of the longest that a configuration takes; a list of all spaces would not fit the memory."""
  assert pack(np.array([7, 4, 10, 6, 9]), (1 << 31) - 1) == [[2, 4, 0, 3, 1]]


@pytest.mark.parametrize("documents", [1, 7, 65_536])
def test_every_target_is_in_one_row_and_documents_are_whole(tmp_path, monkeypatch, documents):
  monkeypatch.setattr(module, "_DOCUMENTS", documents)
  lengths = np.random.default_rng(0).integers(2, 60, 40).tolist()
  store = _store(lengths)
  rows = best_fit(store, T, str(tmp_path))
  targets = []
  for index in range(rows.num_windows(T)):
    row = rows.row(index, T)
    kept = row["loss_mask"]
    used = int(kept.sum())
    assert kept[:used].all() and not any(row[name][used:].any() for name in row)
    np.testing.assert_array_equal(row["targets"][kept], row["tokens"][kept] + 1)
    targets += row["targets"][kept].tolist()
    for segment in range(1, row["segment_ids"].max() + 1):
      here = row["segment_ids"] == segment
      tokens = row["tokens"][here]
      np.testing.assert_array_equal(row["positions"][here], np.arange(len(tokens)))
      document = np.searchsorted(store.starts, tokens[0], side="right") - 1
      inputs = lengths[document] - 1
      # The whole document, or a piece of one that is longer than a row.
      assert len(tokens) == inputs or (inputs > T and (tokens[0] - store.starts[document]) % T == 0)
  borders = {int(start) for start in store.starts}
  assert sorted(targets) == [token for token in range(sum(lengths)) if token not in borders]
  with pytest.raises(IndexError):
    rows.row(rows.num_windows(T), T)


def test_the_padding_is_small_and_told(tmp_path):
  lengths = np.random.default_rng(1).geometric(1 / 100, 3000) + 1
  store = _store(lengths.tolist())
  rows = best_fit(store, 256, str(tmp_path))
  share = without_target(rows, 256)
  assert share == 1 - store.num_targets / (rows.num_windows(256) * 256)
  assert 0 <= share < 0.01


def test_rows_are_kept_and_go_to_other_processes(tmp_path, monkeypatch):
  store = _store([5, 9, 30, 2, 17])
  rows = best_fit(store, T, str(tmp_path))
  monkeypatch.setattr(module, "pack", None)  # They are not packed again.
  for again in (best_fit(store, T, str(tmp_path)), pickle.loads(pickle.dumps(rows))):
    assert again.fingerprint == rows.fingerprint != store.fingerprint
    for index in range(rows.num_windows(T)):
      for name, values in rows.row(index, T).items():
        np.testing.assert_array_equal(again.row(index, T)[name], values)
  (kept,) = (tmp_path / "packing").glob("*/borders.bin")
  kept.write_bytes(kept.read_bytes()[:-8])
  with pytest.raises(InputError, match=r"config\.data\.cache_dir = .*start again"):
    best_fit(store, T, str(tmp_path))


def test_a_configuration_chooses(tmp_path):
  config = DataConfig(seq_len=T, cache_dir=str(tmp_path), packing="best_fit")
  store = _store([5, 9, 30])
  assert rows_to_train(DataConfig(seq_len=T), store) is store
  assert rows_to_train(config, store).num_targets == store.num_targets
  joined = rows_to_train(config, JoinedRows({"a": store, "b": _store([4, 4], 100)}))
  assert [*joined.parts] == ["a", "b"]
  assert joined.num_targets == store.num_targets + 6
  last = joined.num_windows(T) - 1
  assert joined.row(last, T)["tokens"][:7].tolist() == [100, 101, 102, 104, 105, 106, 0]
  examples = TokenStore(store.tokens, store.starts, store.document_bytes, "x", np.array([[1, 3]]))
  with pytest.raises(InputError, match=r"config\.data\.packing = 'best_fit' .*whole examples"):
    rows_to_train(config, examples)
