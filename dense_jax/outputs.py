"""Checks, before any work is done, that results can be written; writes results as JSON.

A command calls `check_file` or `check_destination` first. They write to the destination and
remove what they wrote, because permissions alone do not tell: root has every permission, but
cannot write to a read-only disk or to /proc.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from dense_jax.config import invalid
from dense_jax.files import is_remote, make_path, temporary_beside, write_atomically


def check_file(text: str, field: str) -> epath.Path:
  """Checks that a file can be written at a path, and leaves nothing behind.

  Args:
    text: the path. Its folders need not exist: they are made when the file is written. A
      symbolic link is followed. A path in a bucket (gs://) is not tried.
    field: the field or option it was given for, for error messages.

  Returns:
    The path, with links resolved.

  Raises:
    InputError: the path is that of a folder or a device, or no file can be written there.
  """
  path = make_path(text, field)
  if is_remote(path):
    return path
  valid = "a file that can be written"
  with _refusing(field, text, valid):
    place = Path(path).resolve()
    is_file = place.is_file() or not place.exists()
    if is_file and not text.endswith("/"):
      _write_and_remove(place)
      return epath.Path(place)
  what = "a folder" if text.endswith("/") or place.is_dir() else "no regular file"
  raise invalid(field, text, f"{valid}; it is {what}")


def check_folder(text: str, field: str) -> epath.Path:
  """Checks that files can be written into a folder, new or old, and leaves nothing behind.

  Args:
    text: the path. One in a bucket (gs://) is not tried.
    field: the field or option it was given for, for error messages.

  Returns:
    The path.

  Raises:
    InputError: the path is that of a file, or no file can be written there.
  """
  path = make_path(text, field)
  if not is_remote(path):
    with _refusing(field, text, "a folder that can be written"):
      _write_and_remove(Path(path).resolve() / "file")
  return path


def check_destination(text: str, field: str) -> Path:
  """Checks that a path is a new or empty folder that can be written.

  Args:
    text: the path, on this machine. A symbolic link is followed.
    field: the field or option it was given for, for error messages.

  Returns:
    The path, with links resolved.

  Raises:
    InputError: the folder is not empty, is a file, is a mount point (which a rename cannot
      replace), is in a bucket, or cannot be made.
  """
  path = make_path(text, field)
  valid = "a folder that is empty or does not exist yet"
  if is_remote(path):
    raise invalid(field, text, f"{valid}, on this machine")
  with _refusing(field, text, valid):
    place = Path(path).resolve()
    fits = not place.exists() or (place.is_dir() and not any(place.iterdir()))
    if fits and not place.is_mount():
      _write_and_remove(place)
      return place
  raise invalid(field, text, valid + ("; it is a mount point" if fits else ""))


def write_json(file: epath.Path, content: Any, field: str) -> None:
  """Writes a JSON file atomically, and makes its folder if necessary.

  Args:
    file: the path, from `check_file`.
    content: anything that `json` can encode. A number that is not finite, which JSON cannot
      represent, becomes null.
    field: the field or option that named the file, for error messages.

  Raises:
    InputError: the file cannot be written after all, for example because the disk is full.
  """
  _write(file, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", field)


def write_json_lines(file: epath.Path, lines: Iterable[Any], field: str) -> None:
  """Writes a file with each of `lines` as JSON on a line of its own; see `write_json`."""
  encoded = (json.dumps(_finite(line), allow_nan=False, ensure_ascii=False) for line in lines)
  _write(file, "".join(line + "\n" for line in encoded), field)


def _write(file: epath.Path, text: str, field: str) -> None:
  with _refusing(field, str(file), "a file that can be written"):
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())


def _finite(content: Any) -> Any:
  """Returns the content with None in place of each number that is not finite."""
  if isinstance(content, float):
    return content if math.isfinite(content) else None
  if isinstance(content, Mapping):
    return {key: _finite(value) for key, value in content.items()}
  if isinstance(content, Sequence) and not isinstance(content, str):
    return [_finite(value) for value in content]
  return content


@contextlib.contextmanager
def _refusing(field: str, text: str, valid: str) -> Iterator[None]:
  """Turns errors of the file system into an InputError that names `field`."""
  try:
    yield
  except OSError as error:
    below_a_file = isinstance(error, FileExistsError | NotADirectoryError)
    why = "a file is where a folder should be" if below_a_file else error.strerror
    raise invalid(field, text, f"{valid} ({why})") from error
  except (RuntimeError, ValueError) as error:  # A link that leads back to itself, a null byte.
    raise invalid(field, text, f"{valid} ({error})") from error


def _write_and_remove(place: Path) -> None:
  """Writes a file beside `place`, then removes it and the folders that were made for it."""
  made = [folder for folder in place.parents if not folder.exists()]  # The innermost first.
  partial = temporary_beside(place)
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
      file.write(b"\n")
      file.flush()
      os.fsync(file.fileno())
  finally:
    for remove in (partial.unlink, *(folder.rmdir for folder in made)):
      with contextlib.suppress(OSError):  # It was never made, or another process uses it.
        remove()
