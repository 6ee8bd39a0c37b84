"""Batches of training rows, as a pure function of the step, and batches of held-out rows."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dense_jax.batch import Batch, Segments
from dense_jax.config import DataConfig, invalid
from dense_jax.data import prepared
from dense_jax.data.cache import digest
from dense_jax.data.id_tokenizer import IdTokenizer
from dense_jax.data.packing import TokenStore, build_store
from dense_jax.data.row_store import RowStore
from dense_jax.data.sources import TextSource, split
from dense_jax.data.synthetic.store import TaskStore
from dense_jax.data.synthetic.tasks import check, names
from dense_jax.data.tokenizer import Tokenizer, load_named_tokenizer, load_tokenizer

_LOG = logging.getLogger(__name__)
# Packing holds the global interpreter lock, so a second thread would gain nothing.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
# How long closing waits for the batch that is being prepared.
_CLOSE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Datasets:
  """A configuration's tokenized text, or its synthetic task.

  Attributes:
    tokenizer: the tokenizer of both stores.
    train, heldout: the rows to train on, and those to score.
    fingerprint: hex digest that identifies both stores.
    sources: the documents that the two stores were made from; () if there are none here, as of a
      task, or of text that was tokenized elsewhere.
    description: of text that was tokenized elsewhere, what `identity.describe` said of it there.
  """

  tokenizer: Tokenizer
  train: RowStore
  heldout: RowStore
  fingerprint: str
  sources: tuple[TextSource, ...] = ()
  description: Mapping[str, Any] | None = None


def load_datasets(
    config: DataConfig, progress: Callable[[int], None] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Datasets:
  """Finds the text, loads or trains the tokenizer, and tokenizes the text; or sets up a task.

  A tokenizer that was trained and a text that was tokenized before come from the cache.

  Args:
    config: the data's configuration.
    progress: called with the number of UTF-8 bytes tokenized so far, first of the training text
      and then, again from 0, of the held-out text; not called for text that the cache holds.
    tokenizer: that of the model with which training begins, which `config.tokenizer = "train"` then
      means; None means that there is no such model.

  Raises:
    InputError: the text, the tokenizer, the cache or the task cannot be used, or its tokenizer is
      another one than `tokenizer`.
  """
  if config.task.exists:
    return _load_task(config, tokenizer)
  if prepared.is_prepared(config):
    return _load_prepared(config, tokenizer)
  train_source, heldout_source = split(config)
  if tokenizer is None:
    tokenizer = load_tokenizer(config, train_source)
  elif config.tokenizer != "train":
    _check_named(load_tokenizer(config, train_source), tokenizer, config,
                 "the model that the run begins with")
  train = build_store(train_source, tokenizer, config.cache_dir, progress)
  heldout = build_store(heldout_source, tokenizer, config.cache_dir, progress)
  _warn_of_cut_examples(config, train, heldout)
  return Datasets(
      tokenizer=tokenizer,
      train=train,
      heldout=heldout,
      fingerprint=digest(train.fingerprint, heldout.fingerprint),
      sources=(train_source, heldout_source),
  )


def _check_named(named: Tokenizer, wanted: Tokenizer, config: DataConfig, whose: str) -> None:
  if named.fingerprint != wanted.fingerprint:
    raise invalid(
        "config.data.tokenizer", config.tokenizer,
        f"train, which takes the tokenizer of {whose}; this is another one",
    )


def _load_prepared(config: DataConfig, tokenizer: Tokenizer | None) -> Datasets:
  """Opens tokenized text; `config.tokenizer = "train"` means its tokenizer."""
  text = prepared.read(config)
  if config.tokenizer != "train":
    _check_named(load_named_tokenizer(config), text.tokenizer, config, "the tokenized text")
  if tokenizer is not None and tokenizer.fingerprint != text.tokenizer.fingerprint:
    raise invalid(
        "config.data.path", config.path, "text that was tokenized as the model was trained with "
        "which the run begins",
    )
  _warn_of_cut_examples(config, text.train, text.heldout)
  return Datasets(
      text.tokenizer, text.train, text.heldout, text.description["fingerprint"],
      description=text.description,
  )


def _load_task(config: DataConfig, tokenizer: Tokenizer | None) -> Datasets:
  task = check(config)
  own = IdTokenizer(names(task))
  if tokenizer is not None and tokenizer.fingerprint != own.fingerprint:
    raise invalid(
        "config.data.task.name", task.name, "a task with the ids of the model that the run begins "
        "with; these are others",
    )
  train, heldout = TaskStore(task, heldout=False), TaskStore(task, heldout=True)
  for store in (train, heldout):
    store.row(0, config.seq_len)  # Raises an error if there are too few rows.
  return Datasets(own, train, heldout, digest(train.fingerprint, heldout.fingerprint))


def heldout_store(config: DataConfig, tokenizer: Tokenizer) -> RowStore:
  """Returns the held-out rows of a run: of its text, or of its task.

  Args:
    config: the run's data.
    tokenizer: the run's tokenizer.

  Raises:
    InputError: the text is no longer where it was, or the cache cannot be used.
  """
  if config.task.exists:
    return TaskStore(check(config), heldout=True)
  return heldout_text(config, tokenizer)


def heldout_text(config: DataConfig, tokenizer: Tokenizer) -> TokenStore:
  """Returns the held-out text of a run; see `heldout_store`."""
  if prepared.is_prepared(config):
    text = prepared.read(config)
    if text.tokenizer.fingerprint != tokenizer.fingerprint:
      raise invalid("config.data.path", config.path, "text tokenized by the run's tokenizer")
    return text.heldout
  return build_store(split(config)[1], tokenizer, config.cache_dir)


def texts(config: DataConfig, tokenizer: Tokenizer) -> tuple[Iterable[str], Iterable[str]]:
  """Returns the texts that the loss counts, those to train on and those held out.

  Args:
    config: the run's data, which is text.
    tokenizer: the run's tokenizer, which decodes text that was tokenized elsewhere.

  Raises:
    InputError: the text is no longer where it was.
  """
  if prepared.is_prepared(config):
    text = prepared.read(config)
    return text.train.texts(tokenizer.decode), text.heldout.texts(tokenizer.decode)
  train, heldout = split(config)
  return (part.target_text for part in train), (part.target_text for part in heldout)


def _warn_of_cut_examples(config: DataConfig, *stores: TokenStore) -> None:
  cut = sum(store.num_cut(config.seq_len) for store in stores if store.responses is not None)
  if cut:
    _LOG.warning(
        "config.data.seq_len = %d: of %d examples %d are longer, and what is beyond is learned in "
        "rows of its own, without what comes before it", config.seq_len,
        sum(store.num_documents for store in stores), cut,
    )


def _stack(store: RowStore, indices: Sequence[int], seq_len: int) -> Batch:
  """Stacks the rows of the given indices as a batch of numpy arrays."""
  rows = [store.row(int(index), seq_len) for index in indices]
  # Any: the dataclasses' fields are annotated as jax arrays, and these are numpy arrays.
  columns: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return Batch(
      tokens_BT=columns["tokens"],
      targets_BT=columns["targets"],
      loss_mask_BT=columns["loss_mask"],
      segments=Segments(ids_BT=columns["segment_ids"], positions_BT=columns["positions"]),
  )


class TrainBatches(Iterator[Batch]):
  """An endless iterator of training batches that can be stopped and resumed at any step.

  A step's global batch depends only on the store, `seq_len`, `batch_size`, `seed` and the step,
  not on the number of processes or on interruptions. Every epoch visits each window once, in a
  new order; a batch may span two epochs.
  """

  def __init__(
      self,
      store: RowStore,
      seq_len: int,
      batch_size: int,
      seed: int,
      start_step: int = 0,
      rows: slice | None = None,
  ) -> None:
    """Creates the iterator; it starts to prepare batches at the first `next`.

    Args:
      store: the rows to train on.
      seq_len: T, tokens per row.
      batch_size: B, rows of the global batch.
      seed: seed of the order of the windows; >= 0.
      start_step: the step of the first batch.
      rows: the rows of the global batch that this process loads; None means all.
    """
    windows = store.num_windows(seq_len)
    chosen = slice(None) if rows is None else rows
    self._threads: set[threading.Thread] = set()

    def prepare(indices_B: np.ndarray) -> Batch:
      self._threads.add(threading.current_thread())
      return _stack(store, indices_B[chosen].tolist(), seq_len)

    # grain shuffles epoch e with seed + e. Without spreading, runs with seeds s and s + 1 would
    # see the same orders, one epoch apart.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    self._dataset = (
        grain.MapDataset.range(windows)
        .shuffle(seed=spread)
        .repeat()
        .batch(batch_size, drop_remainder=True)
        .map(prepare)
    )
    self._identity = {
        "config.data": store.fingerprint,
        "config.data.seq_len": seq_len,
        "config.train.batch_size": batch_size,
        "config.seed": seed,
    }
    self._start(start_step)

  def _start(self, step: int) -> None:
    self._step = step
    self._batches = iter(self._dataset[step:].to_iter_dataset(_READ_OPTIONS))

  def __next__(self) -> Batch:
    """Returns the next step's batch: int32 and bool numpy arrays [rows, T]."""
    batch = next(self._batches)
    self._step += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """Returns the position as JSON values: the next step, and all that its batch depends on."""
    return {"step": self._step, **self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position that `get_state` returned, in this or another process.

    Raises:
      InputError: the position belongs to other data, or to other batches of the same data.
    """
    for field, value in self._identity.items():
      if state.get(field) != value:
        wanted = "the same text and tokenizer, of fingerprint " if field == "config.data" else ""
        raise invalid(field, value, f"{wanted}{state.get(field)!r}, with which the run began")
    self.go_to(state["step"])

  def go_to(self, step: int) -> None:
    """Moves to the batch of a step."""
    self.close()
    self._start(step)

  def close(self) -> None:
    """Stops the threads that prepare batches, and waits up to 10 s for the batch under way."""
    self._batches.close()  # It cancels the batches that are not begun, and waits for none.
    for thread in self._threads - {threading.current_thread()}:
      thread.join(_CLOSE_SECONDS)
    self._threads.clear()


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
    yield _fill_up(_stack(store, indices or [low], seq_len), len(indices), len(chosen))


def _fill_up(batch: Batch, kept: int, rows: int) -> Batch:
  def pad(array_BT: Any) -> Any:
    return np.pad(array_BT[:kept], ((0, rows - kept), (0, 0)))

  return Batch(
      tokens_BT=pad(batch.tokens_BT),
      targets_BT=pad(batch.targets_BT),
      loss_mask_BT=pad(batch.loss_mask_BT),
      segments=Segments(
          ids_BT=pad(batch.segments.ids_BT), positions_BT=pad(batch.segments.positions_BT)
      ),
  )
