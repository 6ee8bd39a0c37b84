"""The data cache: its keys, its folders, and how entries are written atomically.

A writer puts a new entry into a folder of its own, whose name ends in `.partial`, and renames
it into place when it is complete. For as long as it lives, the writer holds a lock (flock) on a
file in that folder; the operating system releases the lock when the process ends, even by a
kill. The next writer removes the partial folders whose lock nobody holds, regardless of their
age, and no others.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dense_jax.config import invalid
from dense_jax.files import PARTIALS, is_remote, make_path, temporary_beside, try_lock

_LOCK = "lock"


def digest(*parts: str | int | bytes) -> str:
  """Returns 32 hex characters of the SHA-256 of `parts`, each preceded by its length in bytes."""
  total = hashlib.sha256()
  for part in parts:
    # Python represents the bytes of a file name that are not UTF-8 as surrogates.
    content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
    total.update(len(content).to_bytes(8, "little"))
    total.update(content)
  return total.hexdigest()[:32]


@contextlib.contextmanager
def named_errors(cache_dir: str) -> Iterator[None]:
  """Turns every OSError raised inside (disk full, permission denied) into an InputError.

  Raises:
    InputError: names `config.data.cache_dir` and gives the system's reason.
  """
  try:
    yield
  except OSError as error:
    raise invalid(
        "config.data.cache_dir", cache_dir,
        f"a directory that can be written ({error.strerror or error})",
    ) from error


def cache_folder(cache_dir: str, kind: str) -> Path:
  """Returns the cache's subfolder `kind`, creating it if it does not exist.

  Raises:
    InputError: `cache_dir` is not a writable local directory.
  """
  if is_remote(cache_dir):  # Token stores are memory-mapped, which a bucket does not allow.
    raise invalid("config.data.cache_dir", cache_dir, "a local directory")
  folder = Path(make_path(cache_dir, "config.data.cache_dir")) / kind
  with named_errors(cache_dir):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


@contextlib.contextmanager
def partial_folder(cache_dir: str, kind: str, name: str) -> Iterator[Path]:
  """Yields a new, locked folder to write into, which is deleted on exit.

  The caller renames complete entries out of it. Partial folders that dead writers left beside
  it are removed on entry and on exit.

  Args:
    cache_dir: `config.data.cache_dir`.
    kind: the subfolder, as in `cache_folder`.
    name: the name of the entry to be made; the folder's name begins with it.

  Raises:
    InputError: the folder cannot be created.
  """
  folder = cache_folder(cache_dir, kind)
  _remove_leftovers(folder)
  with named_errors(cache_dir):
    partial, lock = _make_locked(folder / name)
  try:
    yield partial
  finally:
    shutil.rmtree(partial, ignore_errors=True)
    lock.close()
    _remove_leftovers(folder)


def _make_locked(path: Path) -> tuple[Path, IO[bytes]]:
  while True:
    partial = temporary_beside(path)
    partial.mkdir()
    with contextlib.suppress(FileNotFoundError):
      lock = (partial / _LOCK).open("ab")
      # Another process may have locked the new folder first, in order to remove it. On a file
      # system without locks, nobody removes anything.
      if try_lock(lock) is not False and (partial / _LOCK).exists():
        return partial, lock
      lock.close()


def _remove_leftovers(folder: Path) -> None:
  for left in folder.glob(PARTIALS):
    # A folder without a lock file is from a writer that died before it could create one.
    with contextlib.suppress(OSError), (left / _LOCK if left.is_dir() else left).open("ab") as lock:
      if try_lock(lock):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
