"""Files that are whole or absent."""

import os
import uuid
from pathlib import Path


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
