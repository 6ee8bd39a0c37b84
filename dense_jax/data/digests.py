"""Digests of files' whole contents, kept in the cache so that each is computed once.

A digest is kept under the file's real path, size and times of change. A file whose
modification time lies less than two seconds before it was read may change again within the
same tick of its file system's clock (FAT counts two seconds), and nobody would see it: its
digest is not kept, but computed again.
"""

import dataclasses
import errno
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from dense_jax.config import invalid
from dense_jax.data.cache import cache_folder, digest, named_errors
from dense_jax.files import is_remote, parse_json

_TICK_NS = 2_000_000_000
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

Stamp = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FileDigest:
  """What a file holds.

  Attributes:
    size: bytes.
    sha256: of all of them, hex.
  """

  size: int
  sha256: str


def digest_files(files: Sequence[Path], field: str, cache_dir: str) -> tuple[FileDigest, ...]:
  """The digests of files, in their order.

  Args:
    files: local ones or in a bucket.
    field: the config field that named them, for error messages.
    cache_dir: where digests are kept; empty keeps none.

  Raises:
    InputError: a file cannot be read, or the cache has no room.
  """
  kept = _KeptDigests(cache_dir)
  found = []
  for file in files:
    try:
      found.append(kept.digest(file))
    except OSError as error:
      raise invalid(field, str(file), f"a file that can be read ({error})") from error
  return tuple(found)


class _KeptDigests:
  """The digests in a cache: a file of lines for each folder, to which lines are added.

  A line says of itself whether it is whole, and begins with the line end that a killed
  writer may have left out: damage costs the lines that it hits, and they are written again.
  """

  def __init__(self, cache_dir: str) -> None:
    self._cache_dir = cache_dir
    self._folders: dict[str, dict[tuple[str, Stamp], str]] = {}

  def digest(self, file: Path) -> FileDigest:
    """The digest of one file, from the cache where it is there."""
    real = os.fspath(file) if is_remote(file) else os.path.realpath(file)
    folder, name = os.path.split(real)
    stamp = _stamp(file)
    known = self._read(folder)
    if stamp and (name, stamp) in known:
      return FileDigest(stamp[0], known[name, stamp])
    now = time.time_ns()
    with file.open("rb") as handle:
      computed = FileDigest(
          sha256=hashlib.file_digest(handle, "sha256").hexdigest(), size=handle.tell()
      )
    if stamp and stamp[1] < now - _TICK_NS and stamp == _stamp(file):
      known[name, stamp] = computed.sha256
      self._write(folder, name, stamp, computed.sha256)
    return computed

  def _path(self, folder: str) -> Path:
    # A suffix that no text has, as the cache may lie in a folder of text.
    return cache_folder(self._cache_dir, "digests") / f"{digest(folder)}.digests"

  def _read(self, folder: str) -> dict[tuple[str, Stamp], str]:
    if folder not in self._folders:
      known = self._folders[folder] = {}
      try:
        lines = self._path(folder).read_bytes().split(b"\n") if self._cache_dir else []
      except OSError:
        lines = []
      for line in lines:
        try:
          name, stamp, sha256, check = parse_json(line)
          if check == digest(name, *stamp, sha256):
            known[name, tuple(stamp)] = sha256
        except (ValueError, TypeError):
          continue
    return self._folders[folder]

  def _write(self, folder: str, name: str, stamp: Stamp, sha256: str) -> None:
    if not self._cache_dir:
      return
    line = "\n" + json.dumps([name, stamp, sha256, digest(name, *stamp, sha256)])
    with named_errors(self._cache_dir):
      try:
        with self._path(folder).open("ab") as file:
          file.write(line.encode())
      except OSError as error:
        # A cache that others filled serves those who may only read it.
        if error.errno not in _READ_ONLY:
          raise


def _stamp(file: Path) -> Stamp | None:
  """Size in bytes and times of change in ns; None where a bucket does not tell them."""
  if not is_remote(file):
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
  try:
    remote = file.stat()
  except (OSError, RuntimeError):
    return None
  return (remote.length, remote.mtime * 10**9) if remote.mtime else None  # type: ignore[attr-defined]
