"""The data cache: its keys, its folders, and how what is written there becomes whole.

Whatever is made in the cache is first written into a folder of its maker's, whose name ends in
`.partial`, and then renamed to its place. The maker holds a lock (flock) on a file in that
folder for as long as it lives: the system gives it back when a process ends, however it ends.
Whoever makes something next removes the folders whose lock nobody holds, whatever their
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
  """A hex digest of `parts` and of where each of them ends (32 characters)."""
  total = hashlib.sha256()
  for part in parts:
    # A file's name that is not UTF-8 has surrogates.
    content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
    total.update(len(content).to_bytes(8, "little"))
    total.update(content)
  return total.hexdigest()[:32]


@contextlib.contextmanager
def named_errors(cache_dir: str) -> Iterator[None]:
  """What the system refuses inside (a full disk, no right to write) is named.

  Raises:
    InputError: naming `config.data.cache_dir` and the system's reason.
  """
  try:
    yield
  except OSError as error:
    raise invalid(
        "config.data.cache_dir", cache_dir,
        f"a directory that can be written ({error.strerror or error})",
    ) from error


def cache_folder(cache_dir: str, kind: str) -> Path:
  """The folder of one kind of cached thing, made where it is missing.

  Raises:
    InputError: `cache_dir` is not a directory that can be written.
  """
  if is_remote(cache_dir):  # Token stores are mapped into memory.
    raise invalid("config.data.cache_dir", cache_dir, "a local directory")
  folder = Path(make_path(cache_dir, "config.data.cache_dir")) / kind
  with named_errors(cache_dir):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


@contextlib.contextmanager
def partial_folder(cache_dir: str, kind: str, name: str) -> Iterator[Path]:
  """A new folder in a `cache_folder` to write into; what is whole is renamed out of it.

  At the beginning and at the end, what writers that are dead by now have left beside it is
  removed.

  Args:
    cache_dir: `config.data.cache_dir`.
    kind: of the `cache_folder`.
    name: of what is made.

  Raises:
    InputError: it cannot be made.
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
      # Another may have locked the new folder first, in order to remove it. Where a file system
      # has no locks, nobody removes anything.
      if try_lock(lock) is not False and (partial / _LOCK).exists():
        return partial, lock
      lock.close()


def _remove_leftovers(folder: Path) -> None:
  for left in folder.glob(PARTIALS):
    # A folder without a lock was left before it had one.
    with contextlib.suppress(OSError), (left / _LOCK if left.is_dir() else left).open("ab") as lock:
      if try_lock(lock):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
