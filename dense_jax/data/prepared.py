"""Tokenized text as a folder, for machines that do not have the text.

`dense-jax tokenize` writes it, and `config.data.path` names it:

    tokenized.json           what the text is: the `data.json` of a run on it, with the keys below
    tokenizer/          the tokenizer
    train/, heldout/    the two token stores (`dense_jax.data.packing`)

Rows and fingerprints are those of the text itself, so that a run may begin on the one and go on
with the other. A corpus that `dense-jax prepare` wrote (`dense_jax.data.corpus`) is read here too.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from dense_jax.config import DataConfig, invalid
from dense_jax.data.cache import digest
from dense_jax.data.corpus.opening import Corpus, is_corpus
from dense_jax.data.packing import open_store, save_store
from dense_jax.data.row_store import JoinedRows
from dense_jax.data.token_store import TokenStore
from dense_jax.data.tokenizer import Tokenizer, load_named_tokenizer
from dense_jax.errors import InputError
from dense_jax.files import is_remote, make_path, read_object, whole_folder, write_atomically

DESCRIPTION = "tokenized.json"
_FIELD = "config.data.path"
_TOKENIZER = "tokenizer"
_PARTS = ("train", "heldout")
# Keys of tokenized.json that a run's data.json lacks: each part's fingerprint, what is equal in all
# configurations that may read the folder, and the number of ids.
_STORES, _LAYOUT, _VOCABULARY = "stores", "layout", "vocab_size"
# The layout of a corpus, which holds no examples.
_TEXT = {"format": "text"}


@dataclasses.dataclass(frozen=True)
class Prepared:
  """The content of a folder of tokenized text.

  Attributes:
    tokenizer: the tokenizer.
    train, heldout: the two stores; that to train on has the parts of a corpus.
    description: what `dense_jax.data.identity.describe` says of them.
  """

  tokenizer: Tokenizer
  train: TokenStore | JoinedRows[TokenStore]
  heldout: TokenStore
  description: Mapping[str, Any]


def is_prepared(config: DataConfig) -> bool:
  """Returns whether `config.path` is a folder of tokenized text, or of a corpus."""
  return not is_remote(config.path) and (
      _file(config).is_file() or is_corpus(_file(config).parent)
  )


def vocab_size(config: DataConfig) -> int:
  """Returns the number of the tokenizer's ids, of a folder of tokenized text, or of a corpus."""
  if is_corpus(_file(config).parent):
    return Corpus(_file(config).parent).manifest.vocab_size
  return int(_described(config)[_VOCABULARY])


def _file(config: DataConfig) -> Path:
  return Path(make_path(config.path, _FIELD)) / DESCRIPTION


def _described(config: DataConfig) -> dict[str, Any]:
  values = read_object(_file(config), "what `dense-jax tokenize` wrote")
  known = {_STORES: dict, _LAYOUT: dict, _VOCABULARY: int, "fingerprint": str, "tokenizer": str}
  if not all(isinstance(values.get(key), kind) for key, kind in known.items()):
    raise InputError(f"{_file(config)} is damaged: expected what `dense-jax tokenize` wrote")
  return values


def _layout(config: DataConfig) -> dict[str, str]:
  """Returns the keys of config.data that say how a document becomes tokens."""
  return {"format": config.format, "template": config.template}


def read(config: DataConfig) -> Prepared:
  """Opens a folder of tokenized text, or of a corpus.

  Raises:
    InputError: the folder is damaged, or the configuration wants other held-out text or another
      layout of examples than the folder has.
  """
  corpus = Corpus(_file(config).parent) if is_corpus(_file(config).parent) else None
  described = {_LAYOUT: _TEXT} if corpus else _described(config)
  if config.heldout_path:
    raise invalid("config.data.heldout_path", config.heldout_path,
                  "empty: the tokenized text in config.data.path has a held-out part")
  for key, value in _layout(config).items():
    if described[_LAYOUT].get(key, value) != value:
      raise invalid(f"config.data.{key}", value,
                    f"{described[_LAYOUT].get(key)!r}, by which the text in config.data.path was "
                    "tokenized")
  if corpus:
    return Prepared(corpus.tokenizer, corpus.train, corpus.heldout, corpus.describe())
  folder = _file(config).parent
  tokenizer = load_named_tokenizer(str(folder / _TOKENIZER))
  stores: dict[str, TokenStore] = {}
  for part in _PARTS:
    store = open_store(folder / part, str(described[_STORES].get(part)))
    if store is None:
      raise invalid(_FIELD, config.path, f"a whole folder of tokenized text; its {part} is damaged")
    stores[part] = store
  if tokenizer.fingerprint != described["tokenizer"]:
    raise invalid(_FIELD, config.path, "tokenized text beside the tokenizer that made it")
  description = {
      key: value for key, value in described.items() if key not in (_STORES, _LAYOUT, _VOCABULARY)
  }
  return Prepared(tokenizer, **stores, description=description)


def write(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, train: TokenStore, heldout: TokenStore,
    description: Mapping[str, Any],
) -> None:
  """Writes a folder of tokenized text, whole or not at all.

  Args:
    folder: a path at which there is nothing, or an empty folder.
    config: the text's configuration.
    tokenizer: the tokenizer of both stores.
    train: the store to train on; it may be the beginning of the text's.
    heldout: the held-out store.
    description: what `dense_jax.data.identity.describe` says of the whole text.

  Raises:
    InputError: the folder cannot be written.
  """
  values = {
      **description,
      "fingerprint": digest(train.fingerprint, heldout.fingerprint),
      _STORES: {"train": train.fingerprint, "heldout": heldout.fingerprint},
      _LAYOUT: _layout(config),
      _VOCABULARY: tokenizer.vocab_size,
  }
  try:
    with whole_folder(folder) as partial:
      tokenizer.save(epath.Path(partial / _TOKENIZER))
      for part, store in zip(_PARTS, (train, heldout), strict=True):
        save_store(store, partial / part)
      write_atomically(partial / DESCRIPTION, (json.dumps(values, indent=2) + "\n").encode())
  except OSError as error:
    raise invalid("--to", str(folder), f"a folder to make ({error.strerror or error})") from error
