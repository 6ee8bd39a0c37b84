"""Keys, folders and whole-or-nothing writes of the data cache."""

import hashlib
import os
import uuid
from pathlib import Path

from dense_jax.config import invalid


def digest(*parts: str | int | bytes) -> str:
  """A hex digest of `parts` and of where each of them ends (32 characters)."""
  total = hashlib.sha256()
  for part in parts:
    content = part if isinstance(part, bytes) else str(part).encode()
    total.update(len(content).to_bytes(8, "little"))
    total.update(content)
  return total.hexdigest()[:32]


def cache_folder(cache_dir: str, kind: str) -> Path:
  """The folder of one kind of cached thing, made where it is missing.

  Raises:
    InputError: `cache_dir` is not a directory that can be written.
  """
  folder = Path(cache_dir).expanduser() / kind
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise invalid(
        "config.data.cache_dir", cache_dir, f"a directory that can be written ({error.strerror})"
    ) from error
  return folder


def temporary_beside(path: Path) -> Path:
  """A new name in `path`'s folder, so that a rename to `path` is atomic."""
  return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def write_atomically(path: Path, content: bytes) -> None:
  """Writes a file that other processes see whole or not at all."""
  partial = temporary_beside(path)
  try:
    with partial.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
