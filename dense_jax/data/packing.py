"""Stores documents as one stream of tokens on disk, and cuts that stream into windows.

The stream is the concatenation of all documents, each as [bos] tokens [eos]. Window i of T
tokens has inputs [iT, iT + T) and targets [iT + 1, iT + T + 1), so that every token of the
stream but the first is a target of exactly one window. A document that crosses a window's end
continues in the next window as a new segment.
"""

import array
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dense_jax.config import invalid
from dense_jax.data.cache import cache_folder, digest, named_errors, partial_folder
from dense_jax.data.sources import TextSource
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.files import parse_json

_FORMAT = 2  # Increase whenever text is read or laid out differently.
_BATCH_CHARACTERS = 4 << 20
_BATCH_DOCUMENTS = 4096
_IDS_AT_A_TIME = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """A tokenized text, whose arrays are memory-mapped from disk.

  Attributes:
    tokens: uint16 or uint32 [tokens], the stream.
    starts: int64 [documents], the index in the stream of each document's bos.
    document_bytes: int64 [documents], UTF-8 bytes of each document's text.
    fingerprint: hex digest that identifies the text and the tokenizer.
  """

  tokens: np.ndarray
  starts: np.ndarray
  document_bytes: np.ndarray
  fingerprint: str

  @property
  def num_tokens(self) -> int:
    """Number of tokens in the stream, including each document's bos and eos."""
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    """Number of documents; none is empty."""
    return len(self.starts)

  @property
  def num_bytes(self) -> int:
    """Number of UTF-8 bytes of all documents' text, which the targets of all windows spell.

    Bits per byte of the whole text = (summed loss in nats) / ln 2 / num_bytes. The loss of each
    document's eos counts as loss of its text.
    """
    return int(self.document_bytes.sum())

  @property
  def num_targets(self) -> int:
    """Number of predicted tokens over all windows: every token but each document's bos."""
    return self.num_tokens - self.num_documents

  @property
  def targets_per_byte(self) -> float:
    """Predicted tokens per byte of text.

    From some of the windows, bits per byte is estimated as
    (mean nats per target) / ln 2 * targets_per_byte.
    """
    return self.num_targets / self.num_bytes

  def num_windows(self, seq_len: int) -> int:
    """Returns the number of windows of `seq_len` input tokens; the last may be padded."""
    return -(-(self.num_tokens - 1) // seq_len)


def build_store(
    source: TextSource,
    tokenizer: Tokenizer,
    cache_dir: str,
    progress: Callable[[int], None] | None = None,
) -> TokenStore:
  """Opens the source's token store, tokenizing the source first if the cache lacks the store.

  The store is written into a `partial_folder` and renamed when complete, so that killed or
  concurrent writers never leave an incomplete store in its place. The partial folders of
  killed writers are removed.

  Args:
    source: the documents.
    tokenizer: a tokenizer whose ids are below 2**32.
    cache_dir: `config.data.cache_dir`.
    progress: called now and then with the number of UTF-8 bytes of text tokenized so far.

  Raises:
    InputError: the cache cannot be written (a full disk, for example), the text changed while
      it was read, or it cannot be read (see `TextSource`).
  """
  fingerprint = digest(_FORMAT, source.fingerprint, tokenizer.fingerprint)
  path = cache_folder(cache_dir, "tokens") / fingerprint
  store = _open_store(path, fingerprint)
  if store is not None:
    return store
  with partial_folder(cache_dir, "tokens", fingerprint) as partial:
    for done in _write_store(partial / "store", source, tokenizer, cache_dir):
      if progress is not None:
        progress(done)
    source.check_unchanged()
    with named_errors(cache_dir):
      # Another writer may have come first; an incomplete store at the target path is deleted.
      if path.exists() and _open_store(path, fingerprint) is None:
        shutil.rmtree(path)
      with contextlib.suppress(OSError):
        (partial / "store").rename(path)
  store = _open_store(path, fingerprint)
  if store is None:
    raise invalid(
        "config.data.cache_dir", cache_dir, f"a directory where {path} can be made by a rename"
    )
  return store


def _open_store(path: Path, fingerprint: str) -> TokenStore | None:
  """Opens the store in a directory; None means that there is none, or that it is incomplete."""
  try:
    meta = parse_json((path / "meta.json").read_bytes())
    shapes = {
        "tokens": (np.dtype(meta["dtype"]), int(meta["tokens"])),
        "starts": (np.dtype("<i8"), int(meta["documents"])),
        "document_bytes": (np.dtype("<i8"), int(meta["documents"])),
    }
    arrays = {}
    for name, (dtype, length) in shapes.items():
      file = path / f"{name}.bin"
      if file.stat().st_size != dtype.itemsize * length:
        return None
      arrays[name] = np.memmap(file, dtype=dtype, mode="r", shape=(length,))
  except (OSError, ValueError, KeyError, TypeError, OverflowError):
    return None
  return TokenStore(**arrays, fingerprint=fingerprint)


def _write_store(
    directory: Path, source: TextSource, tokenizer: Tokenizer, cache_dir: str
) -> Iterator[int]:
  """Creates the directory and writes a complete store into it.

  Yields:
    The number of UTF-8 bytes of text written so far.
  """
  dtype = np.dtype("<u2" if tokenizer.vocab_size < 1 << 16 else "<u4")
  starts, document_bytes = array.array("q"), array.array("q")
  position = done = 0
  with named_errors(cache_dir):
    directory.mkdir()
    with (directory / "tokens.bin").open("wb") as file:
      for texts in _text_batches(source):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
          starts.append(position)
          document_bytes.append(len(text.encode()))
          row = _row(tokenizer, ids, dtype)
          file.write(row.data)
          position += len(row)
          done += document_bytes[-1]
        yield done
      _sync(file)
    if not starts:
      raise invalid(source.field, str(source.root), "files with text; all of them are empty")
    for name, values in (("starts", starts), ("document_bytes", document_bytes)):
      with (directory / f"{name}.bin").open("wb") as file:
        file.write(np.asarray(values, "<i8").data)
        _sync(file)
    meta = {"dtype": dtype.str, "tokens": position, "documents": len(starts)}
    with (directory / "meta.json").open("wb") as file:
      file.write(json.dumps(meta).encode())
      _sync(file)


def _row(tokenizer: Tokenizer, ids: list[int], dtype: np.dtype) -> np.ndarray:
  """Returns a document's part of the stream: [bos] ids [eos]."""
  row = np.empty(len(ids) + 2, dtype)
  row[0], row[-1] = tokenizer.bos_id, tokenizer.eos_id
  for low in range(0, len(ids), _IDS_AT_A_TIME):  # Lets Python handle signals in between.
    part = ids[low : low + _IDS_AT_A_TIME]
    row[1 + low : 1 + low + len(part)] = part
  return row


def _sync(file: IO[bytes]) -> None:
  file.flush()
  os.fsync(file.fileno())


def _text_batches(source: TextSource) -> Iterator[list[str]]:
  """Yields groups of texts, large enough to keep all cores busy and small enough for memory."""
  texts: list[str] = []
  size = 0
  for document in source:
    texts.append(document.text)
    size += len(document.text)
    if size >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
      yield texts
      texts, size = [], 0
  if texts:
    yield texts


def pack_window(store: TokenStore, index: int, seq_len: int) -> dict[str, np.ndarray]:
  """Returns window `index` of the stream; the documents in it are found by bisection.

  Args:
    store: the tokens.
    index: the window's number, from 0.
    seq_len: T, the window's input tokens.

  Returns:
    Arrays [T], which become the fields of a `Batch` and its `Segments`:
      tokens, targets: int32; 0 at padding.
      loss_mask: bool; false where the target is a document's bos, and at padding.
      segment_ids: int32; 1, 2, ... by document; 0 at padding, which follows the stream's end.
      positions: int32; counted from 0 in each segment; 0 at padding.

  Raises:
    IndexError: there is no such window.
  """
  if not 0 <= index < store.num_windows(seq_len):
    raise IndexError(f"window {index} of {store.num_windows(seq_len)}")
  low = index * seq_len
  length = min(seq_len, store.num_tokens - 1 - low)
  # Document starts in (low, low + length]: the first input begins a segment in any case, and
  # low + length is the index of the last target.
  first, last = np.searchsorted(store.starts, (low, low + length), side="right")
  borders = np.asarray(store.starts[first:last]) - low
  begins = np.zeros(length + 1, bool)
  begins[borders] = True
  window = store.tokens[low : low + length + 1].astype(np.int32)

  segment_ids = 1 + np.cumsum(begins[:length], dtype=np.int32)
  places = np.arange(length, dtype=np.int32)
  positions = places - np.maximum.accumulate(np.where(begins[:length], places, 0))
  pad = (0, seq_len - length)
  return {
      "tokens": np.pad(window[:-1], pad),
      "targets": np.pad(window[1:], pad),
      "loss_mask": np.pad(~begins[1:], pad),
      "segment_ids": np.pad(segment_ids, pad),
      "positions": np.pad(positions, pad),
  }
