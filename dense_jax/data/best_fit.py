"""Rows of whole documents, packed best fit (Ding et al. 2024, arXiv 2404.10830).

A document of n tokens, bos and eos included, has n - 1 inputs, each with the next token as target.
Up to T of them are one piece, and only a longer document is cut, into pieces of T and a rest.
Pieces are taken by decreasing length, and each goes into the row with the least space that it fits
in, or begins a row. Every target is in exactly one row. What space is left is padding.

Documents are packed 65,536 at a time, so that memory does not grow with the text, and the rows are
kept in the cache. Packing takes one core about two seconds a million documents.
"""

import collections
import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dense_jax.config import invalid
from dense_jax.data.cache import cache_folder, digest, named_errors, partial_folder
from dense_jax.data.token_store import TokenStore
from dense_jax.files import sync

_FORMAT = 1  # Increase whenever rows are packed differently.
_DOCUMENTS = 1 << 16
_PIECE = np.dtype("<i8")


@dataclasses.dataclass(frozen=True)
class BestFitRows:
  """The documents of a store in rows of one length, as a `RowStore`.

  Attributes:
    store: the documents.
    seq_len: T, the inputs of a row.
    pieces: int64 [pieces, 2], the first input of each piece in the stream, and its inputs.
    borders: int64 [rows + 1], the first piece of each row, and the number of pieces.
  """

  store: TokenStore
  seq_len: int
  pieces: np.ndarray
  borders: np.ndarray

  @property
  def fingerprint(self) -> str:
    """Hex digest of the store's and of this packing."""
    return digest("best fit", _FORMAT, self.store.fingerprint)

  @property
  def num_bytes(self) -> int:
    """See `RowStore.num_bytes`."""
    return self.store.num_bytes

  @property
  def num_targets(self) -> int:
    """See `TokenStore.num_targets`."""
    return self.store.num_targets

  @property
  def targets_per_byte(self) -> float:
    """See `RowStore.targets_per_byte`."""
    return self.store.targets_per_byte

  def num_windows(self, seq_len: int) -> int:
    """Returns the number of rows."""
    assert seq_len == self.seq_len
    return len(self.borders) - 1

  def row(self, index: int, seq_len: int) -> dict[str, np.ndarray]:
    """Returns row `index`; see `RowStore.row`. A piece is a segment."""
    if not 0 <= index < self.num_windows(seq_len):
      raise IndexError(f"row {index} of {self.num_windows(seq_len)}")
    names = ("tokens", "targets", "segment_ids", "positions")
    row = {name: np.zeros(seq_len, np.int32) for name in names}
    row["loss_mask"] = np.zeros(seq_len, bool)
    place = 0
    first, last = self.borders[index : index + 2].tolist()
    for number, (low, length) in enumerate(self.pieces[first:last].tolist(), 1):
      here = slice(place, place + length)
      window = self.store.tokens[low : low + length + 1].astype(np.int32)
      row["tokens"][here], row["targets"][here] = window[:-1], window[1:]
      row["loss_mask"][here] = True
      row["segment_ids"][here] = number
      row["positions"][here] = np.arange(length)
      place += length
    return row

  def __getstate__(self) -> dict[str, object]:
    # Another process maps the files again; see `TokenStore`.
    return {"store": self.store, "seq_len": self.seq_len,
            "folder": Path(self.pieces.filename).parent}  # type: ignore[attr-defined]

  def __setstate__(self, state: dict[str, object]) -> None:
    rows = _opened(state["store"], state["seq_len"], state["folder"])  # type: ignore[arg-type]
    for field in dataclasses.fields(rows):
      object.__setattr__(self, field.name, getattr(rows, field.name))


def best_fit(store: TokenStore, seq_len: int, cache_dir: str) -> BestFitRows:
  """Packs a store's documents, unless the cache has their rows.

  Args:
    store: plain text.
    seq_len: T, the inputs of a row.
    cache_dir: `config.data.cache_dir`.

  Raises:
    InputError: the store holds examples, whose rows hold whole ones anyway, or the cache cannot be
      written.
  """
  if store.responses is not None:
    raise invalid("config.data.packing", "best_fit", "stream with config.data.format=responses: a "
                  "row holds whole examples there in any case")
  name = digest("best fit", _FORMAT, store.fingerprint, seq_len)
  folder = cache_folder(cache_dir, "packing") / name
  if not folder.is_dir():
    with partial_folder(cache_dir, "packing", name) as partial, named_errors(cache_dir):
      (partial / "rows").mkdir()
      _write(partial / "rows", store, seq_len)
      with contextlib.suppress(OSError):  # Another writer may have come first.
        (partial / "rows").rename(folder)
  try:
    return _opened(store, seq_len, folder)
  except (OSError, ValueError):
    shutil.rmtree(folder, ignore_errors=True)
    raise invalid("config.data.cache_dir", cache_dir, f"a directory that keeps what is written; "
                  f"{folder} was damaged and is removed: start again") from None


def _opened(store: TokenStore, seq_len: int, folder: Path) -> BestFitRows:
  arrays = {}
  for name, shape in (("pieces", (-1, 2)), ("borders", (-1,))):
    flat = np.memmap(folder / f"{name}.bin", _PIECE, mode="r")
    arrays[name] = flat.reshape(shape)
  if int(arrays["borders"][-1]) != len(arrays["pieces"]):
    raise ValueError("the files do not fit each other")
  return BestFitRows(store, seq_len, **arrays)


def _write(folder: Path, store: TokenStore, seq_len: int) -> None:
  total = 0
  with (folder / "pieces.bin").open("wb") as pieces, (folder / "borders.bin").open("wb") as borders:
    borders.write(np.zeros(1, _PIECE).tobytes())
    for part in _pieces(store, seq_len):
      rows = pack(part[:, 1], seq_len)
      pieces.write(part[np.concatenate(rows)].astype(_PIECE).tobytes())
      ends = total + np.cumsum([len(row) for row in rows], dtype=_PIECE)
      borders.write(ends.tobytes())
      total = int(ends[-1])
  for name in ("pieces.bin", "borders.bin"):
    sync(folder / name)


def _pieces(store: TokenStore, seq_len: int) -> Iterator[np.ndarray]:
  """Yields pieces of some documents at a time: int64 [pieces, 2], their first input and inputs."""
  for low in range(0, store.num_documents, _DOCUMENTS):
    bounds = np.asarray(store.starts[low : low + _DOCUMENTS + 1])
    if len(bounds) <= min(_DOCUMENTS, store.num_documents - low):
      bounds = np.append(bounds, store.num_tokens)
    inputs = np.diff(bounds) - 1
    counts = -(-inputs // seq_len)
    document = np.repeat(np.arange(len(inputs)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = number * seq_len
    lengths = np.minimum(inputs[document] - begins, seq_len)
    yield np.stack([bounds[document] + begins, lengths], axis=1)


def pack(lengths: np.ndarray, seq_len: int) -> list[list[int]]:
  """Packs pieces best fit, the longest first.

  Args:
    lengths: int64 [pieces], from 1 to `seq_len`.
    seq_len: the space of a row.

  Returns:
    The indices of each row's pieces. Of rows with the same space, the newest is taken.
  """
  # All pieces fit into one row of so much space; what follows takes time and memory by the space.
  seq_len = min(seq_len, int(lengths.sum()))
  rows: list[list[int]] = []
  by_space: collections.defaultdict[int, list[int]] = collections.defaultdict(list)
  spaces = 0  # Bit s is set where a row has space s left.
  for piece in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[piece])
    fitting = spaces >> length
    if fitting:
      space = length + (fitting & -fitting).bit_length() - 1
      row = by_space[space].pop()
      if not by_space[space]:
        spaces ^= 1 << space
      rows[row].append(piece)
    else:
      space, row = seq_len, len(rows)
      rows.append([piece])
    left = space - length
    if left:
      by_space[left].append(row)
      spaces |= 1 << left
  return rows

