"""Keys and folders of the data cache."""

import hashlib
from pathlib import Path

from dense_jax.config import invalid
from dense_jax.files import is_remote


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
  if is_remote(cache_dir):  # Token stores are mapped into memory.
    raise invalid("config.data.cache_dir", cache_dir, "a local directory")
  folder = Path(cache_dir).expanduser() / kind
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise invalid(
        "config.data.cache_dir", cache_dir, f"a directory that can be written ({error.strerror})"
    ) from error
  return folder
