"""The set of all documents so far, on disk, for exact de-duplication in constant memory."""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dense_jax.files import temporary_beside

HASH_BYTES = 16


def content_hash(text: bytes) -> bytes:
  """Returns the first 16 bytes of a text's SHA-256, by which equal texts are known."""
  return hashlib.sha256(text).digest()[:HASH_BYTES]


class Seen:
  """A set of hashes in a temporary file of a folder."""

  def __init__(self, folder: Path) -> None:
    """Makes the empty set.

    Raises:
      OSError: the file cannot be written; so do `add` and `add_file`.
    """
    self._file = temporary_beside(folder / "seen")
    self._base = sqlite3.connect(self._file, isolation_level=None)
    with _as_os_error():
      # It is made anew by each job, so that nothing is lost with it.
      for setting in ("journal_mode = off", "synchronous = off", "locking_mode = exclusive"):
        self._base.execute(f"pragma {setting}")
      self._base.execute("create table seen (hash blob primary key) without rowid")
      self._base.execute("begin")

  def add(self, content: bytes) -> bool:
    """Adds a hash; returns whether it is new."""
    with _as_os_error():
      return self._base.execute("insert or ignore into seen values (?)", (content,)).rowcount == 1

  def add_file(self, file: Path) -> None:
    """Adds all hashes of a file that holds one after the other."""
    hashes = np.fromfile(file, f"V{HASH_BYTES}")
    with _as_os_error():
      self._base.executemany(
          "insert or ignore into seen values (?)", ((each.tobytes(),) for each in hashes)
      )

  def close(self) -> None:
    """Removes the set."""
    with contextlib.suppress(sqlite3.Error):
      self._base.close()
    self._file.unlink(missing_ok=True)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
  """Turns sqlite's errors, which say nothing but "disk I/O error" of a disk's, into OSError."""
  try:
    yield
  except sqlite3.Error as error:
    raise OSError(f"the set of documents: {error}") from error
