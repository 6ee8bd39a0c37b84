"""Files that are whole or absent, in a local folder or in a bucket."""

import importlib.util
import os
import uuid
from pathlib import Path

from etils import epath

from dense_jax.types import InputError


def make_path(text: str, field: str) -> epath.Path:
  """A path that a user gave: a local one, or gs://BUCKET/... (which pathlib would garble).

  Args:
    text: the path.
    field: where it was given, for error messages.

  Raises:
    InputError: another scheme, or a bucket without the library that reads it.
  """
  scheme, separator, _ = text.partition("://")
  if separator and scheme != "gs":
    raise InputError(f"{field} = {text!r} is not valid: expected a local path or gs://BUCKET/...")
  if separator and not _reads_buckets():
    raise InputError(
        f"{field} = {text!r} is in a bucket, for which gcsfs is missing: pip install -e '.[gcs]'"
    )
  return epath.Path(text)


def _reads_buckets() -> bool:
  return importlib.util.find_spec("gcsfs") is not None


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return "://" in os.fspath(path)


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
