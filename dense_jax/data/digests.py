"""SHA-256 digests of whole files, cached so that each is computed only once.

A cached digest is keyed by the file's real path, size, and modification and status-change
times. If a file was modified less than two seconds before it was read, it could change again
within the same tick of the file system's clock (FAT's resolution is two seconds) without
changing its key. The digest of such a file is not cached, but computed each time.
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
  """A file's size and digest.

  Attributes:
    size: in bytes.
    sha256: hex SHA-256 of the whole content.
  """

  size: int
  sha256: str


def digest_files(files: Sequence[Path], field: str, cache_dir: str) -> tuple[FileDigest, ...]:
  """Returns the digests of `files`, in the same order.

  Args:
    files: local files, or files in a bucket.
    field: the config field that named them, for error messages.
    cache_dir: where digests are cached; "" disables the cache.

  Raises:
    InputError: a file cannot be read, or the cache's disk is full.
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
  """The cached digests: one append-only file of JSON lines for each folder of text.

  Each line carries a checksum of itself, and begins with a newline in case a killed writer left
  the line before it unfinished. Damage therefore affects only the lines that it hits; their
  digests are computed and written again.
  """

  def __init__(self, cache_dir: str) -> None:
    self._cache_dir = cache_dir
    self._folders: dict[str, dict[tuple[str, Stamp], str]] = {}

  def digest(self, file: Path) -> FileDigest:
    """Returns the digest of one file, from the cache if possible."""
    real = os.fspath(file) if is_remote(file) else os.path.realpath(file)
    folder, name = os.path.split(real)
    stamp = stamp_of(file)
    known = self._read(folder)
    if stamp and (name, stamp) in known:
      return FileDigest(stamp[0], known[name, stamp])
    now = time.time_ns()
    with file.open("rb") as handle:
      computed = FileDigest(
          sha256=hashlib.file_digest(handle, "sha256").hexdigest(), size=handle.tell()
      )
    if stamp and stamp[1] < now - _TICK_NS and stamp == stamp_of(file):
      known[name, stamp] = computed.sha256
      self._write(folder, name, stamp, computed.sha256)
    return computed

  def _path(self, folder: str) -> Path:
    # No text file has this suffix: the cache may lie inside a folder of text.
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
        # A read-only cache, filled by another user, can still be read.
        if error.errno not in _READ_ONLY:
          raise


def stamp_of(file: Path) -> Stamp | None:
  """Returns the size in bytes and the times of modification and status change in ns.

  For a file in a bucket there is only the first of the times; None means that it has none.
  """
  if not is_remote(file):
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
  try:
    remote = file.stat()
  except (OSError, RuntimeError):
    return None
  return (remote.length, remote.mtime * 10**9) if remote.mtime else None  # type: ignore[attr-defined]
