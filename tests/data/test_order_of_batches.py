"""Batches are the same for any number of processes, workers and restarts, and as they were.

Each process of a run loads its own rows of the global batch, as `Trainer.rows` says, so that
processes are slices of rows here. `tests/training/test_processes.py` starts real ones.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dense_jax.config.mixture import parse_mixtures
from dense_jax.data.batches import TrainBatches
from dense_jax.data.best_fit import best_fit
from dense_jax.data.row_store import JoinedRows
from dense_jax.data.token_store import TokenStore
from tests.helpers import ROOT

T, ROWS, STEPS, SEED = 16, 8, 40, 11
MIXED = parse_mixtures("web=5,books=2,code=1; 13: web=1,code=3")


def _text(documents: int, salt: int) -> TokenStore:
  """Makes a text of some windows, without any library's random numbers."""
  lengths = [2 + (7 * number + salt) % 45 for number in range(documents)]
  tokens = (np.arange(sum(lengths)) * 2654435761 + salt) % 65_521
  starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
  return TokenStore(tokens.astype(np.uint16), starts, np.asarray(lengths), f"text {salt}")


def _plain(folder):
  del folder
  return _text(40, 1), ()


def _mixed(folder):
  del folder
  return JoinedRows({"web": _text(25, 2), "books": _text(9, 3), "code": _text(5, 4)}), MIXED


def _packed(folder):
  return best_fit(_text(40, 1), T, str(folder)), ()


KINDS = {"plain": _plain, "mixed": _mixed, "packed": _packed}
# The first 16 hex digits of the SHA-256 of all batches. Whatever changes them changes what every
# run computes; `order.VERSION` grows with the order.
GOLDEN = {
    "plain": "7418e4a30d115215", "mixed": "9b2028afd303e87f", "packed": "d779632da4c8ad27",
}


def _hashes(store, mixtures, processes: int, workers: int, restarts: list[int]) -> list[str]:
  """Returns the hash of each step's global batch, loaded by processes that restart at steps."""
  rows = ROWS // processes
  parts = []
  for process in range(processes):
    position = None
    found = []
    for begin, end in zip([0, *restarts], [*restarts, STEPS], strict=True):
      with contextlib.closing(TrainBatches(
          store, T, ROWS, SEED, rows=slice(process * rows, (process + 1) * rows),
          mixtures=mixtures, workers=workers,
      )) as batches:
        if position is not None:
          batches.set_state(json.loads(position))
        found += [next(batches) for _ in range(begin, end)]
        position = json.dumps(batches.get_state())
    parts.append(found)
  hashes = []
  for step in range(STEPS):
    whole = hashlib.sha256()
    for name in ("tokens_BT", "targets_BT", "loss_mask_BT"):
      whole.update(np.concatenate([getattr(p[step], name) for p in parts]).tobytes())
    for name in ("ids_BT", "positions_BT"):
      whole.update(np.concatenate([getattr(p[step].segments, name) for p in parts]).tobytes())
    hashes.append(whole.hexdigest())
  return hashes


def _golden(hashes: list[str]) -> str:
  return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", [*KINDS])
def test_batches_are_those_of_the_repository(kind, tmp_path):
  store, mixtures = KINDS[kind](tmp_path)
  whole = _hashes(store, mixtures, 1, 0, [])
  assert _golden(whole) == GOLDEN[kind]
  moments = random.Random(kind)
  for processes in (1, 2, 4, 8):
    restarts = sorted(moments.sample(range(1, STEPS), 3))
    assert _hashes(store, mixtures, processes, 0, restarts) == whole, (processes, restarts)


@pytest.mark.slow
@pytest.mark.parametrize("kind, processes", [
    ("packed", 1), ("mixed", 2), *(pytest.param(*case, marks=pytest.mark.exhaustive)
                                   for case in (("plain", 1), ("mixed", 1), ("mixed", 4))),
])
def test_batches_of_worker_processes_are_the_same(kind, processes, tmp_path):
  store, mixtures = KINDS[kind](tmp_path)
  restart = random.Random(f"{kind} {processes}").randrange(1, STEPS)
  assert _golden(_hashes(store, mixtures, processes, 2, [restart])) == GOLDEN[kind]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again(caplog):
  store, _ = _plain(None)
  expected = TrainBatches(store, T, ROWS, SEED)
  with contextlib.closing(TrainBatches(store, T, ROWS, SEED, workers=2)) as batches:
    for step in range(30):
      if step in (5, 17):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
      np.testing.assert_array_equal(next(batches).tokens_BT, next(expected).tokens_BT)
  expected.close()
  assert caplog.text.count("a worker of config.data.workers is gone") >= 1


# Reads a batch with two workers, says which processes they are, and waits.
WAIT = """
import multiprocessing, time
from dense_jax.data.batches import TrainBatches
from tests.data.test_order_of_batches import ROWS, SEED, T, _plain
if __name__ == "__main__":
  batches = TrainBatches(_plain(None)[0], T, ROWS, SEED, workers=2)
  next(batches)
  print(*(child.pid for child in multiprocessing.active_children()), flush=True)
  time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path):
  (tmp_path / "wait.py").write_text(WAIT)  # Workers import the file that has begun them.
  with subprocess.Popen(
      [sys.executable, tmp_path / "wait.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE, text=True,
  ) as trainer:
    workers = [pathlib.Path("/proc", pid) for pid in trainer.stdout.readline().split()]
    are_there = [worker.exists() for worker in workers]
    trainer.kill()
  assert are_there == [True, True]
  end = time.monotonic() + 60
  while any(worker.exists() for worker in workers):
    assert time.monotonic() < end
    time.sleep(0.2)


@pytest.mark.parametrize("kind", [*KINDS])
def test_every_row_comes_once_an_epoch_across_restarts(kind, tmp_path):
  """Of a mixture, the rows of each part: an epoch of a part ends when it ends."""
  store, mixtures = KINDS[kind](tmp_path)
  parts = store.parts if isinstance(store, JoinedRows) else {"": store}
  known = {
      part.row(index, T)["tokens"].astype(np.int32).tobytes(): name
      for name, part in parts.items() for index in range(part.num_windows(T))
  }
  moments = random.Random(1)
  taken = {name: [] for name in parts}
  batches = TrainBatches(store, T, ROWS, SEED, mixtures=mixtures)
  for _ in range(STEPS):
    if moments.random() < 0.2:
      position = batches.get_state()
      batches.close()
      batches = TrainBatches(store, T, ROWS, SEED, mixtures=mixtures)
      batches.set_state(position)
    batch = next(batches)
    for row in range(ROWS):
      tokens = batch.tokens_BT[row].tobytes()
      taken[known[tokens]].append(tokens)
  batches.close()
  assert sum(map(len, taken.values())) == STEPS * ROWS
  for name, part in parts.items():
    count = part.num_windows(T)
    assert len(taken[name]) > count  # More than an epoch.
    for epoch in range(len(taken[name]) // count):
      assert len({*taken[name][epoch * count:][:count]}) == count


def test_the_mixture_of_steps_to_come_may_change():
  store, mixtures = _mixed(None)
  whole = TrainBatches(store, T, ROWS, SEED, mixtures=mixtures)
  before = [next(whole) for _ in range(20)]
  position = whole.get_state()
  assert position["mixtures"] == ["0: books=2,code=1,web=5", "13: code=3,web=1"]
  later = parse_mixtures("web=5,books=2,code=1; 13: web=1,code=3; 20: books=1")
  changed = TrainBatches(store, T, ROWS, SEED, mixtures=later)
  changed.set_state(position)
  assert changed.parts_of(19)["books"] == 0 and changed.parts_of(20) == {
      "web": 0, "books": ROWS, "code": 0}
  books = {store.parts["books"].row(i, T)["tokens"].tobytes()
           for i in range(store.parts["books"].num_windows(T))}
  assert {row.tobytes() for row in next(changed).tokens_BT} <= books
  changed.close()
  whole.close()
  assert len(before) == 20
  for text in ("web=5,books=2,code=1", "", "web=1,books=1; 13: web=1,code=3"):
    with pytest.raises(ValueError, match=r"^config\.data\.mixture = .* for the 20 steps that are"):
      TrainBatches(store, T, ROWS, SEED, mixtures=parse_mixtures(text)).set_state(position)


@pytest.mark.parametrize("order, message", [
    (None, "an earlier version of this program, in which the library grain determined the order"),
    ({"version": 0, "digest": "0"}, "had its rows in the order {'version': 0, 'digest': '0'}"),
])
def test_another_order_is_refused(order, message):
  batches = TrainBatches(_text(40, 1), T, ROWS, SEED)
  position = batches.get_state()
  del position["order"]
  if order:
    position["order"] = order
  with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")) as error:
    batches.set_state(position)
  assert "--init-from" in str(error.value)


def test_a_part_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match=r"expected shares of the parts web, books, code"):
    TrainBatches(_mixed(None)[0], T, ROWS, SEED, mixtures=parse_mixtures("wbe=1"))
  with pytest.raises(ValueError, match=r"expected empty: these data have no parts"):
    TrainBatches(_text(40, 1), T, ROWS, SEED, mixtures=parse_mixtures("web=1"))
