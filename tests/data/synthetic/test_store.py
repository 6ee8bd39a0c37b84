"""Rows of tasks as a store: determinism, what is held out, what is refused."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

import dense_jax.types  # noqa: F401  # Registers batches with jax.
from dense_jax.config import DataConfig, TaskConfig
from dense_jax.data import identity, pipeline
from dense_jax.data.batches import TrainBatches, heldout_batches
from dense_jax.data.id_tokenizer import IdTokenizer
from dense_jax.data.synthetic.store import TaskStore, heldout_rows
from dense_jax.data.synthetic.tasks import TASKS, resolve
from dense_jax.data.tokenizer import load_saved_tokenizer
from dense_jax.errors import InputError
from tests.helpers import ROOT

T = 40


def _config(name, seq_len=T, **keys):
  return DataConfig(seq_len=seq_len, task=TaskConfig(**{"name": name, **keys}))


def _data(name, seq_len=T, **keys):
  return pipeline.load_datasets(_config(name, seq_len, **keys))


def _same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_typed_and_padded(name):
  data = _data(name)
  for store in (data.train, data.heldout):
    for index in range(5):
      row = store.row(index, T)
      assert {key: (value.dtype, value.shape) for key, value in row.items()} == {
          "tokens": (np.dtype("int32"), (T,)), "targets": (np.dtype("int32"), (T,)),
          "loss_mask": (np.dtype("bool"), (T,)), "segment_ids": (np.dtype("int32"), (T,)),
          "positions": (np.dtype("int32"), (T,)),
      }
      count = int(row["segment_ids"].sum())
      assert row["loss_mask"].any() and not row["loss_mask"][count:].any()
      np.testing.assert_array_equal(row["positions"][:count], np.arange(count))
      assert not any(value[count:].any() for value in row.values())
      assert max(row["tokens"].max(), row["targets"].max()) < data.tokenizer.vocab_size
      assert not row["targets"][~row["loss_mask"]].any()


@pytest.mark.parametrize("name", TASKS)
def test_a_row_depends_on_task_seed_and_number_alone(name):
  store = _data(name).train
  again = TaskStore(resolve(TaskConfig(name)), heldout=False)
  _same(store.row(7, T), again.row(7, T))
  _same(store.row(2**31 - 2, T), again.row(2**31 - 2, T))
  others = [_data(name, seed=1).train.row(7, T), store.row(8, T), _data(name).heldout.row(7, T)]
  for other in others:
    assert not np.array_equal(store.row(7, T)["tokens"], other["tokens"])
  with pytest.raises(IndexError):
    store.row(2**31 - 1, T)
  with pytest.raises(IndexError):
    _data(name, heldout=3).heldout.row(3, T)


def test_a_row_is_what_it_was_in_another_process():
  """The numbers below were drawn once: every version of numpy has to draw them."""
  script = (
      "from dense_jax.config import TaskConfig\n"
      "from dense_jax.data.synthetic.store import TaskStore\n"
      "from dense_jax.data.synthetic.tasks import resolve\n"
      "task = resolve(TaskConfig('mqar', vocab_size=20, size=2))\n"
      "print(TaskStore(task, heldout=True).row(3, 12)['tokens'].tolist())\n"
  )
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                        timeout=60, check=True)
  assert done.stdout == "[7, 10, 4, 14, 3, 10, 7, 4, 4, 0, 7, 2]\n"


@pytest.mark.parametrize(("name", "keys", "length"), [
    ("parity", {}, 8), ("dyck", {"size": 1, "depth": 2}, 8), ("induction", {"vocab_size": 4}, 6),
    ("copying", {"vocab_size": 3, "size": 1}, 12), ("mqar", {"vocab_size": 4, "size": 1}, 6),
])
def test_no_row_of_training_is_held_out(name, keys, length):
  """So few rows are possible that nearly all are drawn."""
  train, heldout = (
      {store.row(index, length)["tokens"].tobytes() for index in range(1500)}
      for store in (_data(name, length, **keys).train,
                    _data(name, length, seed=5, heldout=1500, **keys).heldout)
  )
  assert train and heldout and not train & heldout


def test_heldout_rows_are_fixed_and_are_about_a_quarter():
  heldout = _data("parity", 12, heldout=3000).heldout
  found = {heldout.row(index, 12)["tokens"].tobytes() for index in range(3000)}
  assert 0.2 < len(found) / 2**12 < 0.3


def test_too_few_rows_are_refused():
  with pytest.raises(InputError, match=r"config\.data\.seq_len = 2 .*too few rows"):
    _data("copying", 2, vocab_size=3, size=1)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_are_a_function_of_seed_and_step(processes):
  store = _data("mqar", size=4).train
  whole = TrainBatches(store, T, 8, seed=5, start_step=3)
  expected = [next(whole) for _ in range(2)]
  whole.close()
  parts = []
  for process in range(processes):
    low, size = process * 8 // processes, 8 // processes
    batches = TrainBatches(store, T, 8, 5, rows=slice(low, low + size))
    for _ in range(3):
      next(batches)
    state = batches.get_state()
    batches.set_state(state)  # As after a restart.
    parts.append([next(batches) for _ in range(2)])
    batches.close()
  for step, batch in enumerate(expected):
    _same(jax.tree.map(lambda *rows: np.concatenate(rows), *[part[step] for part in parts]), batch)


def test_seeds_train_on_other_rows_and_are_scored_on_the_same():
  data = _data("mqar", size=4)
  first, second = (
      next(iter(TrainBatches(data.train, T, 4, seed))) for seed in (0, 1)
  )
  assert not np.array_equal(first.tokens_BT, second.tokens_BT)
  batches = list(heldout_batches(data.heldout, T, 500))
  assert [batch.loss_mask_BT.any(axis=1).sum() for batch in batches] == [500, 500, 24]


def test_a_position_in_another_task_is_refused():
  one, other = _data("mqar", size=4), _data("mqar", size=5)
  assert one.fingerprint != other.fingerprint
  state = TrainBatches(one.train, T, 4, 0).get_state()
  with pytest.raises(InputError, match=r"^config\.data = "):
    TrainBatches(other.train, T, 4, 0).set_state(state)
  longer = _data("mqar", size=4, eval_lengths="99")
  assert longer.fingerprint == one.fingerprint
  assert identity.describe(longer) == identity.describe(one)


def test_lengths_and_depths_at_which_answers_are_scored():
  config = _config("passkey", eval_lengths="80, 40", eval_depths="0,0.25")
  kinds = list(heldout_rows(config))
  assert [(kind.suffix, kind.seq_len, kind.store.task.passkey_depth) for kind in kinds] == [
      ("", 40, -1), ("_depth0", 40, 0), ("_depth0.25", 40, 0.25),
      ("_80", 80, -1), ("_80_depth0", 80, 0), ("_80_depth0.25", 80, 0.25),
  ]
  assert all(kind.store.heldout for kind in kinds)


@pytest.mark.parametrize(("keys", "message"), [
    ({"name": "parity", "vocab_size": 4}, "vocab_size = 4 is not valid: expected 0"),
    ({"name": "parity", "size": 4}, "size = 4 is not valid: expected 0"),
    ({"name": "mqar", "depth": 4}, "depth = 4 is not valid: expected 0"),
    ({"name": "mqar", "passkey_depth": 0.5}, "passkey_depth = 0.5 is not valid"),
    ({"name": "mqar", "eval_depths": "0"}, "eval_depths = '0' is not valid"),
    ({"name": "mqar", "vocab_size": 17}, "vocab_size = 17 is not valid: expected an integer >= 18"),
    ({"name": "copying", "vocab_size": 2}, "vocab_size = 2 is not valid: expected an integer >= 3"),
    ({"name": "induction", "vocab_size": 3}, "expected an integer >= 4"),
    ({"name": "passkey", "vocab_size": 13}, "expected an integer >= 14"),
    ({"name": "listops", "size": 1}, "size = 1 is not valid: expected an integer >= 2"),
    ({"name": "dyck", "depth": 1}, "depth = 1 is not valid: expected an integer >= 2"),
    ({"name": "mqar", "size": 11}, "data.seq_len = 40 is not valid: expected integers >= 44"),
    ({"name": "mqar", "eval_lengths": "80,31"}, "task.eval_lengths = '80,31' is not valid"),
    ({"name": "mqar", "eval_lengths": "80,x"}, "task.eval_lengths = '80,x' is not valid"),
    ({"name": "mqar", "eval_lengths": "-1"}, "task.eval_lengths = '-1' is not valid"),
    ({"name": "passkey", "eval_depths": "2"}, "task.eval_depths = '2' is not valid"),
    ({"name": "passkey", "eval_depths": "a"}, "task.eval_depths = 'a' is not valid"),
])
def test_what_is_not_valid_is_named(keys, message):
  with pytest.raises(InputError) as raised:
    pipeline.load_datasets(DataConfig(seq_len=40, task=TaskConfig(**keys)))
  assert message in str(raised.value)


def test_a_task_is_no_text_to_respond_to():
  config = dataclasses.replace(_config("parity"), format="responses")
  with pytest.raises(InputError, match=r"config\.data\.format = 'responses'"):
    pipeline.load_datasets(config)


def test_a_model_of_other_ids_is_refused():
  own = _data("parity").tokenizer
  assert pipeline.load_datasets(_config("parity"), tokenizer=own).tokenizer.names == own.names
  with pytest.raises(InputError, match=r"config\.data\.task\.name = 'dyck'"):
    pipeline.load_datasets(_config("dyck"), tokenizer=own)


@pytest.mark.parametrize("name", TASKS)
def test_the_ids_have_names_and_are_kept(name, tmp_path):
  tokenizer = _data(name).tokenizer
  assert isinstance(tokenizer, IdTokenizer) and not tokenizer.add_bos
  tokenizer.save(tmp_path)
  kept = load_saved_tokenizer(tmp_path)
  assert kept.names == tokenizer.names and kept.fingerprint == tokenizer.fingerprint
  ids = list(range(tokenizer.vocab_size))
  assert kept.encode(kept.decode(ids)) == ids
  assert kept.decode([-1, kept.vocab_size]) == ""


def test_a_word_that_is_no_name_is_refused(tmp_path):
  tokenizer = IdTokenizer(["_", "a", "b"])
  assert tokenizer.encode_batch([" a\nb ", ""]) == [[1, 2], []]
  with pytest.raises(InputError, match="knows no word 'c': expected names of its task's ids, _ a"):
    tokenizer.encode("a c")
  for names in (["a", "a"], ["a b"], [], [""]):
    with pytest.raises(ValueError, match="different words"):
      IdTokenizer(names)
  (tmp_path / "tokenizer_config.json").write_text('{"dense_jax_tokenizer": "ids", "names": 3}')
  with pytest.raises(InputError, match='expected "names"'):
    load_saved_tokenizer(tmp_path)
