"""Paths, atomic writes, locks and JSON, for local files and for files in a bucket."""

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from dense_jax.errors import InputError


def make_path(text: str, field: str) -> epath.Path:
  """Parses a path given by a user: a local one, or gs://BUCKET/..., which pathlib would garble.

  A leading ~ or ~USER is expanded to the home directory, because a shell does not expand it
  after an equals sign.

  Args:
    text: the path.
    field: the field or option it was given for, for error messages.

  Raises:
    InputError: the path is empty (an unset variable) or longer than the system takes, its home
      directory does not exist, its scheme is not gs, or it is in a bucket and gcsfs is not
      installed.
  """
  if not text.strip():
    raise InputError(f"{field} = {text!r} is not valid: expected a path; it is empty")
  scheme, separator, _ = text.partition("://")
  if (separator and scheme != "gs") or (not separator and text.startswith("gs:")):
    raise InputError(f"{field} = {text!r} is not valid: expected a local path or gs://BUCKET/...")
  if separator and not _reads_buckets():
    raise InputError(
        f"{field} = {text!r} is in a bucket, for which gcsfs is missing: pip install -e '.[gcs]'"
    )
  if separator:
    return epath.Path(text)
  try:
    path = Path(text).expanduser()
    os.lstat(path)  # Whether anything can have this name, not whether it is there.
  except OSError as error:
    if error.errno == errno.ENAMETOOLONG:
      shown = f"{text[:40]}...{text[-40:]}"
      raise InputError(
          f"{field} = {shown!r} is not valid: expected a path that is shorter than its "
          f"{len(text):,} characters ({error.strerror})"
      ) from error
  except (RuntimeError, ValueError) as error:  # No such home directory; a null character.
    raise InputError(f"{field} = {text!r} is not valid: {error}") from error
  return epath.Path(os.fspath(path))


def whole_path(path: str | os.PathLike[str]) -> str:
  """Returns a path from the root, or its bucket, on: the same text for each way to write it."""
  text = os.fspath(path)
  return text.rstrip("/") if is_remote(text) else os.path.abspath(text)


def endings(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
  """Returns the endings of paths, of as few whole parts as tell different ones apart."""
  parts = [tuple(whole_path(path).split("/")) for path in paths]
  for count in range(1, max(map(len, parts), default=0) + 1):
    found = ["/".join(each[-count:]) for each in parts]
    if len(set(found)) == len(set(parts)):
      return found
  return []


def _reads_buckets() -> bool:
  return importlib.util.find_spec("gcsfs") is not None


def is_remote(path: epath.PathLike) -> bool:
  """Returns whether a path is in a bucket."""
  return "://" in os.fspath(path)


# A glob that matches the names of `temporary_beside`.
PARTIALS = ".*.partial"


def temporary_beside(path: Path) -> Path:
  """Returns an unused path in `path`'s folder, from which a rename to `path` is atomic."""
  return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
  """Makes a local folder that other processes see with all of its files, or not at all.

  Args:
    folder: a path at which there is nothing, or an empty folder, whose mode is kept. Its parents
      are made.

  Yields:
    An empty folder beside it, which takes its place when the block ends, and is removed if the
    block raises.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = temporary_beside(folder)
  partial.mkdir()
  try:
    yield partial
    if folder.exists():
      shutil.copymode(folder, partial)
    sync(partial)
    os.replace(partial, folder)
    sync(folder.parent)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
  """Flushes a file's content, or a folder's entries, to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_atomically(path: epath.PathLike, content: bytes) -> None:
  """Writes a file so that other processes see all of the new content or none of it.

  Once it returns, the new content is there even after the machine stops.
  """
  if is_remote(path):
    epath.Path(path).write_bytes(content)  # A bucket shows an object only when it is complete.
    return
  partial = temporary_beside(Path(path))
  try:
    with partial.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
  with contextlib.suppress(OSError):  # Not every file system flushes folders.
    sync(Path(path).parent)


def try_lock(file: int | IO[bytes]) -> bool | None:
  """Tries to lock an open file (flock); the lock ends with the process, even if that is killed.

  Returns:
    True if the file is locked now, false if it is locked through another open file, and None if
    the file system does not support locks.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    return False if isinstance(error, BlockingIOError) else None
  return True


@contextlib.contextmanager
def locked(path: epath.PathLike) -> Iterator[None]:
  """Lets one process at a time read a file and replace it; waits for the others.

  In a bucket, and on a file system without locks, nobody waits.

  Args:
    path: the file, which need not exist; its folder must. A lock file is beside it meanwhile.
  """
  if is_remote(path):
    yield
    return
  beside = Path(path).with_name(f".{Path(path).name}.lock")
  while True:
    held = False
    with beside.open("ab") as lock:
      with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
      # Where its last holder removed it in between, the name is another file's now, or none's.
      with contextlib.suppress(FileNotFoundError):
        held = os.path.samestat(os.fstat(lock.fileno()), beside.stat())
      if held:
        try:
          yield
        finally:
          beside.unlink(missing_ok=True)
        return


def parse_json(
    content: bytes | str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
  """Parses JSON like `json.loads`, but raises ValueError for everything that can be wrong.

  Args:
    content: the JSON text.
    object_pairs_hook: see `json.loads`.

  Raises:
    ValueError: the text is not JSON, is cut short, is not UTF-8, is nested too deeply, or holds
      an integer of more digits than Python parses; the message says which.
  """
  try:
    return json.loads(content, object_pairs_hook=object_pairs_hook)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None


def read_object(file: Path, valid: str) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Args:
    file: a file that exists.
    valid: says what it has to hold, for the error message.

  Raises:
    InputError: it cannot be read, is not JSON, or holds something else.
  """
  try:
    values = parse_json(file.read_bytes())
  except OSError as error:
    raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
  except ValueError as error:
    raise InputError(f"{file} is not JSON: {error}") from error
  if not isinstance(values, dict):
    raise InputError(f"{file} is not valid: expected {valid}")
  return values
