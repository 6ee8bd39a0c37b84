"""The set of all documents so far, on disk, for exact de-duplication in constant memory."""

import contextlib
import hashlib
import sqlite3
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
    """Makes the empty set."""
    self._file = temporary_beside(folder / "seen")
    self._base = sqlite3.connect(self._file, isolation_level=None)
    # It is made anew by each job, so that nothing is lost with it.
    for setting in ("journal_mode = off", "synchronous = off", "locking_mode = exclusive"):
      self._base.execute(f"pragma {setting}")
    self._base.execute("create table seen (hash blob primary key) without rowid")
    self._base.execute("begin")

  def add(self, content: bytes) -> bool:
    """Adds a hash; returns whether it is new."""
    return self._base.execute("insert or ignore into seen values (?)", (content,)).rowcount == 1

  def add_file(self, file: Path) -> None:
    """Adds all hashes of a file that holds one after the other."""
    hashes = np.fromfile(file, f"V{HASH_BYTES}")
    self._base.executemany(
        "insert or ignore into seen values (?)", ((each.tobytes(),) for each in hashes)
    )

  def close(self) -> None:
    """Removes the set."""
    with contextlib.suppress(sqlite3.Error):
      self._base.close()
    self._file.unlink(missing_ok=True)
