"""Batches of training rows, as a function of the step, and batches of held-out rows in order."""

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from dense_jax.batch import Batch, Segments
from dense_jax.config import invalid
from dense_jax.config.mixture import KEY, Mixture
from dense_jax.data import order
from dense_jax.data.child_process import end_with
from dense_jax.data.row_store import JoinedRows, RowStore
from dense_jax.errors import InputError

_LOG = logging.getLogger(__name__)
# Packing holds the global interpreter lock, so a second thread would gain nothing.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
_WORKER_BUFFER = 2
# How long closing waits for the batch that is being prepared.
_CLOSE_SECONDS = 10.0
# More batches than any run has.
_ENDLESS = 1 << 40
_GO_ON = (
    "it would repeat some rows and leave out others. Go on with the version that the run began "
    "with, or begin a new run in another --workdir with --init-from this one"
)
_OF_GRAIN = (
    "the run in --workdir was begun by an earlier version of this program, in which the library "
    f"grain determined the order of the rows, and this version has another order: {_GO_ON}"
)

Columns = dict[str, np.ndarray]


class _Source:
  """Batch k as columns [rows, T]; grain reads it in a thread, or in processes of its own."""

  def __init__(
      self, store: RowStore, seq_len: int, batch_size: int, seed: int,
      mixtures: Sequence[Mixture], rows: slice | None,
  ) -> None:
    self.threads: set[threading.Thread] = set()
    self._process = os.getpid()
    self._store, self._seq_len, self._batch_size = store, seq_len, batch_size
    self._rows = range(batch_size)[slice(None) if rows is None else rows]
    self._parts = _parts(store, mixtures)
    sizes = {name: part.num_windows(seq_len) for name, part in self._parts.items()}
    phases = [order.Phase(mixture.step * batch_size, mixture.shares) for mixture in mixtures]
    self.order = order.Order(sizes, seed, phases or [order.Phase(0, {name: 1 for name in sizes})])

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, step: int) -> Columns:
    self.threads.add(threading.current_thread())
    stores = [*self._parts.values()]
    part_N, row_N = self.places(step)
    return _columns([
        (stores[part_N[place]], int(row_N[place])) for place in self._rows
    ], self._seq_len)

  def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the part and the row of each row of the global batch; see `Order.rows`."""
    return self.order.rows(step * self._batch_size, self._batch_size)

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "threads": set()}  # Threads stay in their process.

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__ |= state
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid == self._process:  # A worker of `config.data.workers`.
      end_with(self._process)


def _parts(store: RowStore, mixtures: Sequence[Mixture]) -> Mapping[str, RowStore]:
  """Returns the parts that the mixtures draw from; without any, all rows are one part.

  Raises:
    InputError: a mixture names a part that is not there.
  """
  if not mixtures:
    return {"": store}
  parts = store.parts if isinstance(store, JoinedRows) else {}
  for mixture in mixtures:
    for name in mixture.shares:
      if name not in parts:
        there = f"of the parts {', '.join(parts)}" if parts else (
            "empty: these data have no parts, as a corpus has that `dense-jax prepare` wrote")
        raise invalid(KEY, str(mixture), f"shares {there}" if parts else there)
  return parts


class TrainBatches(Iterator[Batch]):
  """An endless iterator of training batches that can be stopped and resumed at any step.

  A step's global batch depends only on the store, `seq_len`, `batch_size`, `seed`, `mixtures` and
  the step (`dense_jax.data.order`): not on the number of processes or workers, nor on
  interruptions. Every epoch visits each row once, in a new order; a batch may span two epochs.
  """

  def __init__(
      self,
      store: RowStore,
      seq_len: int,
      batch_size: int,
      seed: int,
      start_step: int = 0,
      rows: slice | None = None,
      mixtures: Sequence[Mixture] = (),
      workers: int = 0,
  ) -> None:
    """Creates the iterator; it starts to prepare batches at the first `next`.

    Args:
      store: the rows to train on.
      seq_len: T, tokens per row.
      batch_size: B, rows of the global batch.
      seed: seed of the order of the rows; >= 0.
      start_step: the step of the first batch.
      rows: the rows of the global batch that this process loads; None means all.
      mixtures: shares of the parts of `store`, which is then a `JoinedRows`; () means that the rows
        of all parts are one set.
      workers: processes that prepare batches; 0 means a thread of this one.

    Raises:
      InputError: a mixture names a part that `store` does not have.
    """
    self._source = _Source(store, seq_len, batch_size, seed, mixtures, rows)
    self._mixtures, self._workers = mixtures, workers
    self._identity = {
        "config.data": store.fingerprint,
        "config.data.seq_len": seq_len,
        "config.train.batch_size": batch_size,
        "config.seed": seed,
    }
    self._order = {"version": order.VERSION, "digest": self._source.order.digest}
    self._start(start_step)

  def _start(self, step: int) -> None:
    self._step = step
    batches = grain.MapDataset.source(self._source)[step:].to_iter_dataset(_READ_OPTIONS)
    if self._workers:
      if not flags.FLAGS.is_parsed():  # grain asks for flags of its own; no command here has them.
        flags.FLAGS.mark_as_parsed()
      batches = batches.mp_prefetch(grain.MultiprocessingOptions(
          num_workers=self._workers, per_worker_buffer_size=_WORKER_BUFFER
      ))
    self._batches = iter(batches)

  def __next__(self) -> Batch:
    """Returns the next step's batch: int32 and bool numpy arrays [rows, T].

    Where a worker process has died, for example because the system killed it, the workers are
    started again, once for each batch.
    """
    try:
      columns = next(self._batches)
    except RuntimeError as error:
      if not self._workers:
        raise
      _LOG.warning("a worker of config.data.workers is gone (%s): starting again with the batch "
                   "of step %d", error, self._step)
      self._batches.close()
      self._start(self._step)
      columns = next(self._batches)
    self._step += 1
    return _batch(columns)

  def parts_of(self, step: int) -> dict[str, int]:
    """Returns how many rows of a step's global batch each part of the mixture has."""
    part_N, _ = self._source.places(step)
    counts = np.bincount(part_N, minlength=len(self._source.order.names))
    return dict(zip(self._source.order.names, counts.tolist(), strict=True))

  def get_state(self) -> dict[str, Any]:
    """Returns the position as JSON values: the next step, and all that its batch depends on."""
    return {
        "step": self._step, **self._identity, "order": self._order,
        "mixtures": self._until(self._step),
    }

  def _until(self, step: int) -> list[str]:
    """Returns the mixtures of the batches before a step."""
    return [str(mixture) for mixture in self._mixtures if mixture.step < step]

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position that `get_state` returned, in this or another process.

    Mixtures of later steps may differ.

    Raises:
      InputError: the position belongs to other data, to other batches of the same data, or to an
        order that another version of this program has determined.
    """
    for field, value in self._identity.items():
      if state.get(field) != value:
        wanted = "the same text and tokenizer, of fingerprint " if field == "config.data" else ""
        raise invalid(field, value, f"{wanted}{state.get(field)!r}, with which the run began")
    if "order" not in state:
      raise InputError(_OF_GRAIN)
    before = state["mixtures"]
    if before != self._until(state["step"]):
      raise invalid(
          KEY, "; ".join(map(str, self._mixtures)),
          f"{'; '.join(before) if before else 'no mixture'} for the {state['step']} steps that are "
          "done, and another one from a later step on",
      )
    if state["order"] != self._order:
      raise InputError(
          f"the run in --workdir had its rows in the order {state['order']!r}, and this program "
          f"has them in {self._order!r}: {_GO_ON}"
      )
    self.go_to(state["step"])

  def go_to(self, step: int) -> None:
    """Moves to the batch of a step."""
    self.close()
    self._start(step)

  def close(self) -> None:
    """Stops the threads and processes that prepare batches.

    It waits up to 10 s for the batch under way.
    """
    self._batches.close()  # It cancels the batches that are not begun, and waits for none.
    for thread in self._source.threads - {threading.current_thread()}:
      thread.join(_CLOSE_SECONDS)
    self._source.threads.clear()


def _columns(rows: Sequence[tuple[RowStore, int]], seq_len: int) -> Columns:
  """Stacks rows, each one of a store, as arrays [rows, T]."""
  found = [store.row(index, seq_len) for store, index in rows]
  return {name: np.stack([row[name] for row in found]) for name in found[0]}


def _batch(columns: Columns) -> Batch:
  # Any: the dataclasses' fields are annotated as jax arrays, and these are numpy arrays.
  values: dict[str, Any] = dict(columns)
  return Batch(
      tokens_BT=values["tokens"],
      targets_BT=values["targets"],
      loss_mask_BT=values["loss_mask"],
      segments=Segments(ids_BT=values["segment_ids"], positions_BT=values["positions"]),
  )


def heldout_batches(
    store: RowStore, seq_len: int, batch_size: int, limit: int = 0, rows: slice | None = None
) -> Iterator[Batch]:
  """Yields the store's rows once, in order.

  Args:
    store: the held-out rows.
    seq_len: T, tokens per row.
    batch_size: B, rows of the global batch. The last batch is filled up with rows of padding
      (segment ids 0, loss mask false), which add nothing to a sum over the loss mask.
    limit: if above 0, the greatest number of batches, spread evenly over the store; 0 means all.
    rows: the rows of each global batch that this process loads; None means all.

  Yields:
    Batches of int32 and bool numpy arrays [rows, T].
  """
  windows = store.num_windows(seq_len)
  batches = -(-windows // batch_size)
  taken = min(limit, batches) if limit > 0 else batches
  chosen = range(batch_size) if rows is None else range(batch_size)[rows]
  for number in range(taken):
    low = number * batches // taken * batch_size
    indices = [low + row for row in chosen if low + row < windows]
    # A process whose rows are all padding still needs arrays of their shapes and dtypes.
    columns = _columns([(store, index) for index in indices or [low]], seq_len)
    pad = ((0, len(chosen) - len(indices)), (0, 0))
    yield _batch({name: np.pad(a[: len(indices)], pad) for name, a in columns.items()})
