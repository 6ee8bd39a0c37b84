"""Training batches, which are a pure function of the step, and held-out batches in order."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import dense_jax.types  # noqa: F401  # Registers batches with jax.
from dense_jax.data import packing
from dense_jax.data.batches import TrainBatches, heldout_batches
from dense_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
T = 8


def _store(windows: int, seq_len: int = T) -> packing.TokenStore:
  """Makes a store of documents of 11 tokens; each token is its index in the stream."""
  count = windows * seq_len + 1
  starts = np.arange(0, count, 11)
  return packing.TokenStore(
      tokens=np.arange(count, dtype=np.uint32), starts=starts,
      document_bytes=np.full(len(starts), 9), fingerprint=f"store of {windows}",
  )


def _take(batches, count):
  taken = [next(batches) for _ in range(count)]
  batches.close()
  return taken


def _windows(batch) -> list[int]:
  return (batch.tokens_BT[:, 0] // T).tolist()


def _same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_batches_are_typed_numpy_rows():
  store = _store(10)
  (batch,) = _take(TrainBatches(store, T, 4, seed=0), 1)
  for leaf in jax.tree.leaves(batch):
    assert isinstance(leaf, np.ndarray) and leaf.shape == (4, T)
  assert batch.tokens_BT.dtype == batch.targets_BT.dtype == np.int32
  assert batch.loss_mask_BT.dtype == bool
  assert batch.segments.ids_BT.dtype == batch.segments.positions_BT.dtype == np.int32
  for row, index in enumerate(_windows(batch)):
    window = store.row(index, T)
    np.testing.assert_array_equal(batch.tokens_BT[row], window["tokens"])
    np.testing.assert_array_equal(batch.segments.positions_BT[row], window["positions"])


@pytest.mark.parametrize("windows, batch_size", [(12, 4), (13, 4), (3, 8), (1, 2), (5, 1)])
def test_every_epoch_visits_each_window_once_in_a_new_order(windows, batch_size):
  epochs = 6
  steps = -(-windows * epochs // batch_size)
  batches = _take(TrainBatches(_store(windows), T, batch_size, seed=3), steps)
  visits = [index for batch in batches for index in _windows(batch)]
  orders = [tuple(visits[e * windows : (e + 1) * windows]) for e in range(epochs)]
  assert all(sorted(order) == list(range(windows)) for order in orders)
  assert windows < 12 or len(set(orders)) == epochs


def test_the_seed_gives_the_order_and_neighbours_share_none():
  def orders(seed):
    return [tuple(_windows(b)) for b in _take(TrainBatches(_store(16), T, 16, seed), 3)]

  assert orders(0) == orders(0)
  assert len({*orders(0), *orders(1), *orders(2**40)}) == 9


@pytest.mark.parametrize("step", [0, 1, 2, 5, 1000])
def test_going_on_from_any_step_gives_the_same_batches(step):
  store = _store(7)
  whole = TrainBatches(store, T, 3, seed=1, start_step=max(step - 2, 0))
  for _ in range(min(step, 2)):
    next(whole)
  state = json.loads(json.dumps(whole.get_state()))
  assert state["step"] == step
  expected = _take(whole, 4)

  _same(_take(TrainBatches(store, T, 3, seed=1, start_step=step), 4), expected)
  resumed = TrainBatches(store, T, 3, seed=1)
  next(resumed)
  resumed.set_state(state)
  assert resumed.get_state() == state
  _same(_take(resumed, 4), expected)


def test_closing_waits_for_the_batch_that_is_being_prepared(monkeypatch):
  begun, go_on = threading.Event(), threading.Event()
  calls, before = [], set(threading.enumerate())

  def pack(*arguments, pack=packing.TokenStore.row):
    calls.append(arguments)
    if len(calls) == 3:  # Of a batch that was not asked for yet.
      begun.set()
      go_on.wait()
    return pack(*arguments)

  monkeypatch.setattr(packing.TokenStore, "row", pack)
  batches = TrainBatches(_store(7), T, 1, seed=1)
  next(batches)
  begun.wait()
  ends = threading.Timer(0.2, go_on.set)
  ends.start()
  batches.close()
  assert go_on.is_set()
  ends.join()
  assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_rows_together_are_the_global_batch(processes):
  store, rows = _store(9), 8 // processes
  whole = _take(TrainBatches(store, T, 8, seed=5), 3)
  parts = [
      _take(TrainBatches(store, T, 8, seed=5, rows=slice(p * rows, (p + 1) * rows)), 3)
      for p in range(processes)
  ]
  for step, expected in enumerate(whole):
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[p[step] for p in parts])
    _same(joined, expected)


@pytest.mark.parametrize(
    "field, other",
    [
        ("config.seed", {"seed": 2}),
        ("config.train.batch_size", {"batch_size": 4}),
        ("config.data.seq_len", {"seq_len": T + 1}),
        ("config.data", {"store": _store(8)}),
    ],
)
def test_a_position_in_other_batches_is_refused(field, other):
  arguments = {"store": _store(7), "seq_len": T, "batch_size": 3, "seed": 1}
  state = TrainBatches(**arguments).get_state()
  batches = TrainBatches(**{**arguments, **other})
  message = f"^{field} = .* is not valid: expected .*{state[field]!r}, with which the run began"
  with pytest.raises(InputError, match=message.replace(".", r"\.").replace(r"\.*", ".*")) as error:
    batches.set_state(state)
  assert ("the same text and tokenizer" in str(error.value)) == (field == "config.data")
  next(batches)
  batches.close()


def test_heldout_windows_come_in_order_and_the_last_batch_is_filled_up():
  store = _store(10)
  batches = list(heldout_batches(store, T, 4))
  assert [batch.tokens_BT.shape for batch in batches] == [(4, T)] * 3
  tokens = np.concatenate([batch.tokens_BT for batch in batches])
  np.testing.assert_array_equal(tokens[:10].ravel(), np.arange(80))
  for leaf in jax.tree.leaves(batches[-1]):
    assert not leaf[2:].any()
  assert sum(batch.loss_mask_BT.sum() for batch in batches) == store.num_targets


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_rows_together_are_the_held_out_batches(processes):
  """Of four processes, the last one has only rows of padding."""
  store, rows = _store(12), 8 // processes
  whole = list(heldout_batches(store, T, 8))
  parts = [
      list(heldout_batches(store, T, 8, rows=slice(p * rows, (p + 1) * rows)))
      for p in range(processes)
  ]
  assert len(whole) == 2
  for number, expected in enumerate(whole):
    _same(jax.tree.map(lambda *rows: np.concatenate(rows), *[p[number] for p in parts]), expected)


@pytest.mark.parametrize("limit, expected", [(1, [0]), (2, [0, 12]), (3, [0, 8, 16]), (9, 6)])
def test_a_limit_spreads_evenly(limit, expected):
  batches = list(heldout_batches(_store(23), T, 4, limit))
  first = [_windows(batch)[0] for batch in batches]
  assert first == (expected if isinstance(expected, list) else [4 * i for i in range(expected)])


def test_importing_is_quiet_and_an_open_iterator_does_not_hold_up_the_exit():
  script = (
      "import numpy as np\n"
      "from dense_jax.data import batches, packing\n"
      "store = packing.TokenStore(np.arange(99), np.array([0]), np.array([97]), 'x')\n"
      "next(batches.TrainBatches(store, 8, 2, seed=0))\n"
  )
  done = subprocess.run(
      [sys.executable, "-c", script],
      cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
