"""Documents as one stream of tokens on disk, and that stream cut into windows.

The stream is every document after the other, each as [bos] tokens [eos]. Window i of T
tokens has the inputs [iT, iT + T) and the targets [iT + 1, iT + T + 1), so that over all
windows each token of the stream but the first is a target once. A document that a
window's end cuts goes on in the next window as a segment of its own.
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

_FORMAT = 2  # A change of how text is read or laid out is another format.
_BATCH_CHARACTERS = 4 << 20
_BATCH_DOCUMENTS = 4096
_IDS_AT_A_TIME = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """A tokenized text; its arrays are mapped from disk.

  Attributes:
    tokens: uint16 or uint32 (tokens,), the stream.
    starts: int64 (documents,), the place in the stream of each document's bos.
    document_bytes: int64 (documents,), UTF-8 bytes of each document's text.
    fingerprint: hex, of the text and the tokenizer.
  """

  tokens: np.ndarray
  starts: np.ndarray
  document_bytes: np.ndarray
  fingerprint: str

  @property
  def num_tokens(self) -> int:
    """Tokens of the stream, with each document's bos and eos."""
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    """Documents; each has some text."""
    return len(self.starts)

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of all text, which all windows' targets together spell.

    Bits per byte of the whole text = (summed loss in nats) / ln 2 / num_bytes. The eos
    of each document is predicted too, and is charged to its text.
    """
    return int(self.document_bytes.sum())

  @property
  def num_targets(self) -> int:
    """Tokens that are predicted over all windows: all but each document's bos.

    Of a part of the windows, bits per byte is estimated by
    (mean nats of a target) / ln 2 * num_targets / num_bytes.
    """
    return self.num_tokens - self.num_documents

  def num_windows(self, seq_len: int) -> int:
    """Windows of `seq_len` input tokens; the last may be padded."""
    return -(-(self.num_tokens - 1) // seq_len)


def build_store(
    source: TextSource,
    tokenizer: Tokenizer,
    cache_dir: str,
    progress: Callable[[int], None] | None = None,
) -> TokenStore:
  """The source's token store, tokenized now unless the cache has it whole.

  It is written into a `partial_folder` and renamed when complete, so that a writer that is
  killed, or several writers at once, leave either nothing or a whole store there. What killed
  writers left in the cache is removed.

  Args:
    source: the documents.
    tokenizer: its ids are below 2 ** 32.
    cache_dir: `config.data.cache_dir`.
    progress: called now and then with the UTF-8 bytes of text tokenized so far.

  Raises:
    InputError: the cache cannot be written (a full disk, say), or the text changed meanwhile;
      see `TextSource`.
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
  """The store in a directory, or None where there is none or a part of it is missing."""
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
  """Makes the directory and writes a whole store into it.

  Yields:
    The UTF-8 bytes of text written so far.
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
  """A document's part of the stream: [bos] ids [eos]."""
  row = np.empty(len(ids) + 2, dtype)
  row[0], row[-1] = tokenizer.bos_id, tokenizer.eos_id
  for low in range(0, len(ids), _IDS_AT_A_TIME):  # Signals are heard in between.
    part = ids[low : low + _IDS_AT_A_TIME]
    row[1 + low : 1 + low + len(part)] = part
  return row


def _sync(file: IO[bytes]) -> None:
  file.flush()
  os.fsync(file.fileno())


def _text_batches(source: TextSource) -> Iterator[list[str]]:
  """Texts in groups that keep all cores busy and fit in memory."""
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
  """Row `index` of the store, found in O(log documents) steps.

  Returns:
    Arrays of shape (seq_len,), named as a `Batch` and its `Segments` name them:
      tokens, targets: int32; 0 at padding.
      loss_mask: bool, false where the target is a document's bos, or padding.
      segment_ids: int32, 1, 2, ... by document; 0 is padding, at the stream's end.
      positions: int32, from 0 in each segment; 0 at padding.

  Raises:
    IndexError: there is no such window.
  """
  if not 0 <= index < store.num_windows(seq_len):
    raise IndexError(f"window {index} of {store.num_windows(seq_len)}")
  low = index * seq_len
  length = min(seq_len, store.num_tokens - 1 - low)
  # Borders in (low, low + length]: the first input begins a segment in any case, and the
  # border at low + length is the last target's.
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
