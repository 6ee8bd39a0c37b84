"""Opens a corpus for training."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from dense_jax.config import invalid
from dense_jax.data.cache import digest
from dense_jax.data.corpus.encoding import token_dtype
from dense_jax.data.corpus.manifest import (
    JOB,
    MANIFEST,
    SHARDS,
    STARTS,
    STARTS_ENDS,
    TOKENIZER,
    Manifest,
    read_manifest,
)
from dense_jax.data.corpus.shards import INDEX_DTYPE, ShardedTokens, read_index
from dense_jax.data.row_store import JoinedRows
from dense_jax.data.token_store import TokenStore
from dense_jax.data.tokenizer import Tokenizer, load_saved_tokenizer
from dense_jax.errors import InputError

_TRAIN = "train-"
_FIELD = "config.data.path"
# Descriptions list so many files by name.
_MOST_FILES = 10_000


def is_corpus(folder: Path) -> bool:
  """Returns whether a folder is one of `dense-jax prepare`, finished or not."""
  return (folder / JOB).is_file() and (folder / SHARDS).is_dir()


class Corpus:
  """A folder that `dense-jax prepare` wrote.

  Attributes:
    manifest: what it says of itself.
    tokenizer: its tokenizer.
    train: the parts to train on.
    heldout: the held-out documents.
  """

  def __init__(self, folder: Path) -> None:
    """Opens the folder; documents' ids are read when they are needed.

    The starts of documents are compared with the manifest, about a second for 100 million
    documents. A shard's blocks have checksums of their own, which are compared when they are read.

    Raises:
      InputError: the corpus is not finished, or a file is missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
      raise invalid(_FIELD, str(folder), "a finished corpus: the command that began it goes on")
    self._folder = folder
    self.manifest: Manifest = read_manifest(folder)
    self.tokenizer: Tokenizer = load_saved_tokenizer(folder / TOKENIZER)
    fits = (self.tokenizer.fingerprint, self.tokenizer.vocab_size)
    if fits != (self.manifest.tokenizer, self.manifest.vocab_size):
      raise InputError(f"{folder / TOKENIZER} is not the tokenizer of {folder / MANIFEST}: "
                       "expected the one that prepare wrote there")
    stores = {name: self._store(folder, name) for name in self.manifest.streams}
    self.heldout = stores.pop("heldout")
    self.train = JoinedRows({name.removeprefix(_TRAIN): store for name, store in stores.items()})

  def _store(self, folder: Path, name: str) -> TokenStore:
    shards = self.manifest.streams[name]
    documents = sum(shard.documents for shard in shards)
    starts, sizes = (
        _mapped(folder / STARTS / f"{name}{end}", documents, self.manifest.starts[f"{name}{end}"])
        for end in STARTS_ENDS
    )
    tokens = ShardedTokens(
        folder / SHARDS, shards, token_dtype(self.tokenizer.vocab_size)
    )
    return TokenStore(tokens, starts, sizes, self.manifest.stream_digest(name))

  def verify(self) -> int:
    """Compares all shards with the manifest; returns their bytes.

    Raises:
      InputError: one is damaged; the error names it.
    """
    for shard in self.manifest.shards:
      file = self._folder / SHARDS / shard.name
      if _sha256(file) != shard.sha256:
        raise InputError(f"{file} is damaged: expected the SHA-256 of the manifest, {shard.sha256}")
      read_index(self._folder / SHARDS, shard)
    return sum(shard.file_bytes for shard in self.manifest.shards)

  def describe(self) -> dict[str, Any]:
    """Returns what `dense_jax.data.identity.describe` says of the data."""
    sources = self.manifest.sources
    files = {
        "count": len(sources), "bytes": sum(source.size for source in sources),
        "digest": digest(*(source.sha256 for source in sources)),
    }
    if len(sources) <= _MOST_FILES:
      files["files"] = [[source.name, source.size, source.sha256] for source in sources]
    return {
        "fingerprint": digest(self.train.fingerprint, self.heldout.fingerprint),
        "tokenizer": self.tokenizer.fingerprint,
        "texts": [self.train.fingerprint, self.heldout.fingerprint],
        "files": {_FIELD: files},
    }


def _mapped(file: Path, documents: int, sha256: str) -> np.ndarray:
  """Maps a file of one number a document, whose content has to be what the manifest says."""
  try:
    if file.stat().st_size != documents * INDEX_DTYPE.itemsize or _sha256(file) != sha256:
      raise ValueError(f"it is not that of {documents:,} documents in the manifest")
    return np.memmap(file, INDEX_DTYPE, mode="r", shape=(documents,))
  except (OSError, ValueError) as error:
    raise InputError(
        f"{file} cannot be read ({error}): expected what prepare wrote. Remove {file.parent} and "
        f"{MANIFEST}, and the same command makes them anew"
    ) from error


def _sha256(file: Path) -> str:
  with file.open("rb") as content:
    return hashlib.file_digest(content, "sha256").hexdigest()
