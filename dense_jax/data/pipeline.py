"""A configuration's data: tokenized text, or a synthetic task."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dense_jax.config import DataConfig, invalid
from dense_jax.data import prepared
from dense_jax.data.best_fit import BestFitRows, best_fit
from dense_jax.data.cache import digest
from dense_jax.data.id_tokenizer import IdTokenizer
from dense_jax.data.packing import build_store
from dense_jax.data.row_store import JoinedRows, RowStore
from dense_jax.data.sources import TextSource, split
from dense_jax.data.synthetic.store import TaskStore
from dense_jax.data.synthetic.tasks import check, names
from dense_jax.data.token_store import TokenStore
from dense_jax.data.tokenizer import Tokenizer, load_named_tokenizer, load_tokenizer

_LOG = logging.getLogger(__name__)


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
  config.mixtures()  # Raises an error, before the text is tokenized.
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
    named = load_named_tokenizer(config.tokenizer)
    _check_named(named, text.tokenizer, config, "the tokenized text")
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
    parts = text_parts(text.train).values()
    train_texts = itertools.chain.from_iterable(part.texts(tokenizer.decode) for part in parts)
    return train_texts, text.heldout.texts(tokenizer.decode)
  train, heldout = split(config)
  return (part.target_text for part in train), (part.target_text for part in heldout)


def text_parts(store: RowStore) -> Mapping[str, TokenStore]:
  """Returns the texts of a store by the names of its parts; {} of a synthetic task."""
  if isinstance(store, JoinedRows):
    return store.parts
  return {"": store} if isinstance(store, TokenStore) else {}


def rows_to_train(config: DataConfig, store: RowStore) -> RowStore:
  """Returns the rows that a run trains on, packed as `config.packing` says.

  Args:
    config: the run's data.
    store: the training part of its `Datasets`.

  Raises:
    InputError: the store cannot be packed so, or the cache cannot be written.
  """
  if config.packing == "stream":
    return store
  if isinstance(store, JoinedRows):
    return JoinedRows({
        name: best_fit(part, config.seq_len, config.cache_dir)
        for name, part in store.parts.items()
    })
  if not isinstance(store, TokenStore):
    raise invalid("config.data.packing", config.packing, "stream: a task has rows of its own")
  return best_fit(store, config.seq_len, config.cache_dir)


def without_target(store: RowStore, seq_len: int) -> float | None:
  """Returns the share of places in the rows of a text that have no target; None of a task.

  In rows of a stream these are the last tokens of documents; in packed ones they are padding.
  """
  if not isinstance(store, TokenStore | JoinedRows | BestFitRows):
    return None
  return 1 - store.num_targets / (store.num_windows(seq_len) * seq_len)


def _warn_of_cut_examples(config: DataConfig, *stores: RowStore) -> None:
  examples = [
      part for store in stores for part in text_parts(store).values() if part.responses is not None
  ]
  cut = sum(store.num_cut(config.seq_len) for store in examples)
  if cut:
    _LOG.warning(
        "config.data.seq_len = %d: of %d examples %d are longer, and what is beyond is learned in "
        "rows of its own, without what comes before it", config.seq_len,
        sum(store.num_documents for store in examples), cut,
    )
