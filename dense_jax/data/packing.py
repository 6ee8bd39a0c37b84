"""Tokenizes documents into a store on disk; see `token_store`."""

import array
import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dense_jax.config import invalid
from dense_jax.data.cache import cache_folder, digest, named_errors, partial_folder
from dense_jax.data.sources import Document, TextSource
from dense_jax.data.token_store import TokenStore
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.files import parse_json

_FORMAT = 2  # Increase whenever text is read or laid out differently.
_BATCH_CHARACTERS = 4 << 20
_BATCH_DOCUMENTS = 4096
_IDS_AT_A_TIME = 1 << 20


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
  store = open_store(path, fingerprint)
  if store is not None:
    return store
  with partial_folder(cache_dir, "tokens", fingerprint) as partial:
    for done in _write_store(partial / "store", source, tokenizer, cache_dir):
      if progress is not None:
        progress(done)
    source.check_unchanged()
    with named_errors(cache_dir):
      # Another writer may have come first; an incomplete store at the target path is deleted.
      if path.exists() and open_store(path, fingerprint) is None:
        shutil.rmtree(path)
      with contextlib.suppress(OSError):
        (partial / "store").rename(path)
  store = open_store(path, fingerprint)
  if store is None:
    raise invalid(
        "config.data.cache_dir", cache_dir, f"a directory where {path} can be made by a rename"
    )
  return store


def open_store(path: Path, fingerprint: str) -> TokenStore | None:
  """Opens the store in a directory; None means that there is none, or that it is incomplete.

  Args:
    path: the directory.
    fingerprint: that of the text and the tokenizer that the store was made from.
  """
  try:
    meta = parse_json((path / "meta.json").read_bytes())
    documents = (int(meta["documents"]),)
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        "tokens": (np.dtype(meta["dtype"]), (int(meta["tokens"]),)),
        "starts": (np.dtype("<i8"), documents),
        "document_bytes": (np.dtype("<i8"), documents),
    }
    if "responses" in meta:
      shapes["responses"] = (np.dtype("<i8"), (int(meta["responses"]), 2))
    arrays = {}
    for name, (dtype, shape) in shapes.items():
      file = path / f"{name}.bin"
      if file.stat().st_size != dtype.itemsize * math.prod(shape):
        return None
      arrays[name] = np.memmap(file, dtype=dtype, mode="r", shape=shape)
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
  starts, document_bytes, responses = array.array("q"), array.array("q"), array.array("q")
  position = done = 0
  with named_errors(cache_dir):
    directory.mkdir()
    with (directory / "tokens.bin").open("wb") as file:
      for documents in _batches(source):
        parts = [part for document in documents for part in _parts(document)]
        encoded = iter(tokenizer.encode_batch(parts))
        for document in documents:
          starts.append(position)
          document_bytes.append(len(document.target_text.encode()))
          turns = [(next(encoded), next(encoded)) for _ in document.turns]
          row, spans = _row(tokenizer, turns or [([], next(encoded))], dtype)
          if turns:
            responses.extend(position + border for border in spans)
          file.write(row.data)
          position += len(row)
          done += len(document.text.encode())
        yield done
      _sync(file)
    if not starts:
      raise invalid(source.field, str(source.root), "files with text; all of them are empty")
    _write_borders(
        directory, dtype, position, np.asarray(starts), np.asarray(document_bytes),
        None if source.template is None else np.asarray(responses).reshape(-1, 2),
    )


def save_store(store: TokenStore, directory: Path) -> None:
  """Writes a store into a new directory, for `open_store`."""
  directory.mkdir()
  with (directory / "tokens.bin").open("wb") as file:
    file.write(np.ascontiguousarray(store.tokens).data)
    _sync(file)
  _write_borders(directory, store.tokens.dtype, store.num_tokens, store.starts,
                 store.document_bytes, store.responses)


def _write_borders(
    directory: Path, dtype: np.dtype, tokens: int, starts: np.ndarray, document_bytes: np.ndarray,
    responses: np.ndarray | None,
) -> None:
  """Writes all of a store but its tokens, meta.json last."""
  meta = {"dtype": dtype.str, "tokens": tokens, "documents": len(starts)}
  arrays = {"starts": starts, "document_bytes": document_bytes}
  if responses is not None:
    arrays["responses"] = responses
    meta["responses"] = len(responses)
  for name, values in arrays.items():
    with (directory / f"{name}.bin").open("wb") as file:
      file.write(np.ascontiguousarray(values, "<i8").data)
      _sync(file)
  with (directory / "meta.json").open("wb") as file:
    file.write(json.dumps(meta).encode())
    _sync(file)


def _parts(document: Document) -> list[str]:
  """Returns the texts that are encoded apart: the document's, or prompt, response, prompt ..."""
  return [text for turn in document.turns for text in turn] or [document.text]


def _row(
    tokenizer: Tokenizer, turns: list[tuple[list[int], list[int]]], dtype: np.dtype
) -> tuple[np.ndarray, list[int]]:
  """Returns a document's part of the stream, [bos] prompt response [eos] ...

  Args:
    tokenizer: has bos and eos.
    turns: the ids of prompts and responses; of a text, the empty prompt and the text.
    dtype: of the stream.

  Returns:
    The tokens, and for each response the index of its first token and that after its eos.
  """
  row = np.empty(1 + sum(len(prompt) + len(response) + 1 for prompt, response in turns), dtype)
  row[0] = tokenizer.bos_id
  place, spans = 1, []
  for prompt, response in turns:
    begin = _fill(row, place, prompt)
    place = _fill(row, begin, response)
    row[place] = tokenizer.eos_id
    place += 1
    spans += [begin, place]
  return row, spans


def _fill(row: np.ndarray, place: int, ids: list[int]) -> int:
  """Writes ids into a row from a place on; returns the place after them."""
  for low in range(0, len(ids), _IDS_AT_A_TIME):  # Lets Python handle signals in between.
    part = ids[low : low + _IDS_AT_A_TIME]
    row[place + low : place + low + len(part)] = part
  return place + len(ids)


def _sync(file: IO[bytes]) -> None:
  file.flush()
  os.fsync(file.fileno())


def _batches(source: TextSource) -> Iterator[list[Document]]:
  """Yields groups of documents, large enough to keep all cores busy, small enough for memory."""
  documents: list[Document] = []
  size = 0
  for document in source:
    documents.append(document)
    size += len(document.text)
    if size >= _BATCH_CHARACTERS or len(documents) >= _BATCH_DOCUMENTS:
      yield documents
      documents, size = [], 0
  if documents:
    yield documents
