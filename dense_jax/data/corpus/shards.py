"""Shards of tokens: how they are written, and read at random.

A shard is an ArrayRecord file of blocks of 8,192 ids, the last of which may be shorter. Beside it
is its index, a file of two int64 for each document: its ids, bos and eos included, and the UTF-8
bytes of its text.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from dense_jax.config.mixture import NAME
from dense_jax.errors import InputError
from dense_jax.files import sync, temporary_beside

BLOCK = 8192
INDEX = ".index"
INDEX_DTYPE = np.dtype("<i8")
# One record a group, so that each can be read by itself; ids hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_MOST_OPEN = 64
_NAME = re.compile(rf"(train|heldout)-{NAME.pattern}-\d{{6,9}}\.array_record")


@dataclasses.dataclass(frozen=True)
class Shard:
  """A shard, as the manifest describes it.

  Attributes:
    name: the file's name in the folder of shards; the index has that name and ".index".
    part: the part of the corpus that it belongs to.
    heldout: whether its documents are held out.
    documents, tokens, text_bytes: their numbers.
    file_bytes: the size of the ArrayRecord file.
    sha256: of the ArrayRecord file.
    content: hex digest of the ids and the index, whatever the file's format.
  """

  name: str
  part: str
  heldout: bool
  documents: int
  tokens: int
  text_bytes: int
  file_bytes: int
  sha256: str
  content: str

  def __post_init__(self) -> None:
    # A damaged manifest must not lead out of the folder.
    if not _NAME.fullmatch(self.name) or not NAME.fullmatch(self.part):
      raise ValueError(f"{self.name!r} of {self.part!r} is no shard's name")
    if min(self.documents, self.tokens, self.text_bytes, self.file_bytes) < 1:
      raise ValueError(f"the shard {self.name} is empty")


def shard_name(heldout: bool, part: str, number: int) -> str:
  """Returns the name of the shard of an input file's documents of one part and side."""
  return f"{'heldout' if heldout else 'train'}-{part}-{number:06d}.array_record"


class ShardWriter:
  """Writes one shard; it appears under its name when it is whole."""

  def __init__(self, folder: Path, name: str, part: str, heldout: bool, dtype: np.dtype) -> None:
    """Begins a shard in a folder that exists."""
    self._path = folder / name
    self._part, self._heldout = part, heldout
    self._partials = [temporary_beside(self._path), temporary_beside(self._path)]
    with _as_os_error():
      self._writer = array_record_module.ArrayRecordWriter(
          str(self._partials[0]), _WRITER_OPTIONS
      )
    self._index = self._partials[1].open("wb")
    self._block_bytes = BLOCK * dtype.itemsize
    self._itemsize = dtype.itemsize
    self._waiting = bytearray()
    self._content = hashlib.sha256()
    self._documents = self._tokens = self._text_bytes = 0

  def add(self, ids: bytes, text_bytes: int) -> None:
    """Adds a document: its ids, of the shard's type, and the size of its text.

    Raises:
      OSError: the files cannot be written.
    """
    entry = np.array([len(ids) // self._itemsize, text_bytes], INDEX_DTYPE).tobytes()
    self._index.write(entry)
    self._content.update(entry)
    self._content.update(ids)
    self._documents += 1
    self._tokens += len(ids) // self._itemsize
    self._text_bytes += text_bytes
    self._waiting += ids
    whole = len(self._waiting) // self._block_bytes * self._block_bytes
    with _as_os_error():
      for low in range(0, whole, self._block_bytes):
        self._writer.write(bytes(self._waiting[low : low + self._block_bytes]))
    del self._waiting[:whole]

  def finish(self) -> Shard:
    """Writes what is left, and gives both files their names; returns what the shard is.

    Raises:
      OSError: the files cannot be written.
    """
    with _as_os_error():
      if self._waiting:
        self._writer.write(bytes(self._waiting))
      self._writer.close()
    self._index.close()
    for partial in self._partials:
      sync(partial)
    with self._partials[0].open("rb") as file:
      sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = self._partials[0].stat().st_size
    os.replace(self._partials[1], self._path.with_name(self._path.name + INDEX))
    os.replace(self._partials[0], self._path)
    return Shard(
        self._path.name, self._part, self._heldout, self._documents, self._tokens,
        self._text_bytes, size, sha256, self._content.hexdigest()[:32],
    )

  def abandon(self) -> None:
    """Removes what was written, unless it is finished."""
    # Both write what they hold, to a disk that may be full: perhaps that is why it is abandoned.
    with contextlib.suppress(OSError), _as_os_error():
      self._writer.close()
    with contextlib.suppress(OSError):
      self._index.close()
    for partial in self._partials:
      partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
  """Turns the library's errors of writing, which have no class of their own, into OSError."""
  try:
    yield
  except (RuntimeError, ValueError) as error:
    raise OSError(str(error)) from error


def read_index(folder: Path, shard: Shard) -> np.ndarray:
  """Returns a shard's index: int64 [documents, 2], ids and bytes of each document.

  Raises:
    InputError: it is missing, or does not say what the manifest says.
  """
  file = folder / (shard.name + INDEX)
  try:
    index = np.fromfile(file, INDEX_DTYPE)
  except OSError as error:
    raise InputError(f"{file} cannot be read ({error}): expected what prepare wrote") from error
  fits = index.size == 2 * shard.documents and bool((index >= 0).all())
  index = index.reshape(-1, 2) if fits else np.zeros((0, 2), INDEX_DTYPE)
  # In Python's integers, which a damaged index cannot make overflow.
  sums = [
      sum(sum(index[low : low + BLOCK, column].tolist()) for low in range(0, len(index), BLOCK))
      for column in (0, 1)
  ]
  if sums != [shard.tokens, shard.text_bytes] or (index[:, 0] < 2).any():
    raise InputError(
        f"{file} is damaged: expected {shard.documents:,} documents of {shard.tokens:,} ids, as "
        "the manifest says. Remove the folder and prepare it again"
    )
  return index


class _OpenReaders:
  """The readers of this process that were used last, each of which holds a file and a thread."""

  def __init__(self) -> None:
    self._readers: collections.OrderedDict[tuple[object, int], Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def read(self, key: tuple[object, int], file: Path, blocks: Iterable[int]) -> bytes:
    """Returns blocks of a file, whose reader has this key."""
    with self._lock:
      reader = self._readers.pop(key, None) or array_record_module.ArrayRecordReader(
          str(file), _READER_OPTIONS
      )
      self._readers[key] = reader  # The newest is the last.
      while len(self._readers) > _MOST_OPEN:
        self._readers.popitem(last=False)
      return b"".join(reader.read([*blocks]))


_OPEN = _OpenReaders()


class ShardedTokens:
  """The ids of shards as one stream, which is read in slices like an array."""

  def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> None:
    """Opens nothing yet.

    Args:
      folder: where the shards lie.
      shards: in the order of the stream.
      dtype: of the ids.

    Raises:
      InputError: a shard is missing, or has another size than the manifest says.
    """
    self.dtype = dtype
    self._folder, self._shards = folder, tuple(shards)
    self._ends = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
    for shard in shards:
      file = folder / shard.name
      try:
        size = file.stat().st_size
      except OSError as error:
        raise InputError(f"{file} cannot be read ({error}): expected a shard") from error
      if size != shard.file_bytes:
        raise _damaged(file, f"it has {size:,} bytes instead of {shard.file_bytes:,}")
    self._forget()

  def _forget(self) -> None:
    self._own = object()  # Tells this object's readers from those of others.

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != "_own"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._forget()

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, place: slice) -> np.ndarray:
    """Returns the ids of a slice without a step.

    Raises:
      InputError: a shard is damaged; the error names it.
    """
    low, high, step = place.indices(len(self))
    assert step == 1
    parts = [*self._read(low, max(low, high))]
    return np.concatenate(parts) if parts else np.empty(0, self.dtype)

  def _read(self, low: int, high: int) -> Iterator[np.ndarray]:
    while low < high:
      number = int(np.searchsorted(self._ends, low, side="right")) - 1
      begin, end = int(self._ends[number]), int(self._ends[number + 1])
      until = min(high, end)
      first, last = (low - begin) // BLOCK, (until - begin - 1) // BLOCK
      ids = self._blocks(number, first, last)
      yield ids[low - begin - first * BLOCK : until - begin - first * BLOCK]
      low = until

  def _blocks(self, number: int, first: int, last: int) -> np.ndarray:
    """Returns the ids of the blocks `first` to `last` of a shard."""
    shard = self._shards[number]
    file = self._folder / shard.name
    try:
      content = _OPEN.read((self._own, number), file, range(first, last + 1))
    except Exception as error:  # The library has no class for errors of reading.
      why = str(error).partition("\n")[0][:200]
      if re.search("Too many open files|Permission denied", why):
        raise InputError(f"{file} cannot be read ({why})") from error
      raise _damaged(file, why) from error
    wanted = min((last + 1) * BLOCK, shard.tokens) - first * BLOCK
    if len(content) != wanted * self.dtype.itemsize:
      raise _damaged(file, f"its blocks {first} to {last} have another size")
    return np.frombuffer(content, self.dtype)


def _damaged(file: Path, why: str) -> InputError:
  return InputError(
      f"{file} is damaged ({why}): expected a shard that prepare wrote. Remove the folder and "
      "prepare it again, or copy it again"
  )
