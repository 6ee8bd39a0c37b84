"""Files that are whole or absent, in a local folder or in a bucket."""

import fcntl
import importlib.util
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from etils import epath

from dense_jax.errors import InputError


def make_path(text: str, field: str) -> epath.Path:
  """A path that a user gave: a local one, or gs://BUCKET/... (which pathlib would garble).

  A leading ~ or ~USER is that home directory, wherever the path was given: a shell leaves it as
  it is after an equals sign.

  Args:
    text: the path.
    field: where it was given, for error messages.

  Raises:
    InputError: an empty path (a variable that is not set), a home directory that does not
      exist, another scheme, or a bucket without the library that reads it.
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
    return epath.Path(os.fspath(Path(text).expanduser()))
  except RuntimeError as error:
    raise InputError(f"{field} = {text!r} is not valid: {error}") from error


def _reads_buckets() -> bool:
  return importlib.util.find_spec("gcsfs") is not None


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return "://" in os.fspath(path)


# The names that `temporary_beside` makes, as a glob.
PARTIALS = ".*.partial"


def temporary_beside(path: Path) -> Path:
  """A new name in `path`'s folder, so that a rename to `path` is atomic."""
  return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def write_atomically(path: epath.PathLike, content: bytes) -> None:
  """Writes a file that other processes see whole or not at all."""
  if is_remote(path):
    epath.Path(path).write_bytes(content)  # A bucket shows an object when it has all of it.
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


def try_lock(file: int | IO[bytes]) -> bool | None:
  """Locks an open file (flock), which ends with the process however that ends.

  Returns:
    Whether it is locked now; false where another open file has the lock, None where the file
    system has no locks.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    return False if isinstance(error, BlockingIOError) else None
  return True


def parse_json(
    content: bytes | str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
  """JSON, as `json.loads` has it, with one kind of error for all that can be wrong with it.

  Args:
    content: the text.
    object_pairs_hook: see `json.loads`.

  Raises:
    ValueError: it is no JSON, is cut short, is not UTF-8, is nested too deeply to be read, or
      holds an integer of more digits than Python reads; the message says which.
  """
  try:
    return json.loads(content, object_pairs_hook=object_pairs_hook)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
