"""Finds text files: those of a path, a directory or a glob, locally and in buckets.

Directories and globs follow the same rules. Files and directories whose name begins with a dot
are skipped, unless the path itself spells the dot. Symbolic links to files and directories are
followed. Each real file is taken once, under a name that needs no link if it has one; so loops
of links end, and a link to a file that is found anyway changes nothing.
"""

import collections
import fnmatch
import functools
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from dense_jax.config import invalid
from dense_jax.files import is_remote, make_path

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")


@functools.cache
def warn_once(message: str) -> None:
  """Logs a warning, once per process: files are found and read several times."""
  logging.getLogger(__name__).warning(message)


def readable(name: str) -> str:
  r"""Returns a file name fit to print: bytes that are not UTF-8 are written as \xNN."""
  return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def file_key(file: Path) -> object:
  """Returns a key that is equal for all names of the same file: device and inode, or the URL.

  Raises:
    OSError: there is no such file.
  """
  if is_remote(file):
    return os.fspath(file)
  status = file.stat()
  return status.st_dev, status.st_ino


def find_files(
    path: str, field: str, suffixes: tuple[str, ...] = SUFFIXES
) -> tuple[Path, list[Path]]:
  """Finds the text files of a path.

  Args:
    path: a file; a directory, searched recursively for files with one of `suffixes`; or a glob,
      in which `**` matches any number of directories. A gs://BUCKET/... path may be any of the
      three, but may not use `**`.
    field: the config field the path is from, for error messages.
    suffixes: of the files to find.

  Returns:
    The root directory, relative to which the files are named, and the files, in no particular
    order.

  Raises:
    InputError: nothing was found, the path or glob matches a file with another suffix, or a
      directory cannot be read.
  """
  place = make_path(path, field)
  valid = f"a file, directory or glob of {', '.join(suffixes)}"
  valid = f'"stdlib", or {valid}' if suffixes == SUFFIXES else valid
  try:
    if is_remote(place):
      root, files = _find_remote(place, field, suffixes)
    else:
      root, files = _find_local(Path(place), suffixes)
  except OSError as error:
    raise invalid(field, path, f"{valid} that can be read ({error})") from error
  if not files:
    raise invalid(field, path, f"{valid}; no such file was found")
  for file in files:
    if not file.name.endswith(suffixes):
      raise invalid(field, path, f"{valid}; {readable(file.name)} has another suffix")
  return root, files


def _find_local(place: Path, suffixes: tuple[str, ...]) -> tuple[Path, list[Path]]:
  if place.is_file():
    return place.parent, [place]
  if place.is_dir():
    entries = [entry for folder in _walk([place]) for entry in _entries(folder)]
    return place, _real_files(place, [e for e in entries if e.name.endswith(suffixes)])
  parts = place.parts
  fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
  root = Path(*parts[:fixed])
  found = [root]
  for pattern in parts[fixed:]:
    found = _walk(found) if pattern == "**" else [e for f in found for e in _match(f, pattern)]
  if parts[-1] == "**":
    found = [entry for folder in found for entry in _entries(folder)]
  return root, _real_files(root, found)


def _is_pattern(text: str) -> bool:
  return re.search(r"[*?[]", text) is not None


def _match(folder: Path, pattern: str) -> list[Path]:
  """Returns a folder's entries that match a glob without slashes; [] if there is no folder."""
  if not _is_pattern(pattern) or (folder / pattern).exists():
    return [folder / pattern]
  if not folder.is_dir():
    return []
  return [e for e in _entries(folder, pattern) if fnmatch.fnmatchcase(e.name, pattern)]


def _entries(folder: Path, pattern: str = "") -> list[Path]:
  """Returns a folder's sorted entries, without hidden ones unless the pattern begins with a dot."""
  try:
    names = sorted(os.listdir(folder))
  except PermissionError:
    warn_once(f"{readable(str(folder))} may not be read: it is passed over")
    return []
  return [folder / n for n in names if pattern.startswith(".") or not n.startswith(".")]


def _walk(folders: Iterable[Path]) -> list[Path]:
  """Returns `folders` and all folders below them, each real folder once.

  Links are followed after all real folders, so that a folder gets a name without links if it
  has one.
  """
  waiting = collections.deque(folder for folder in folders if folder.is_dir())
  links: collections.deque[Path] = collections.deque()
  seen, found = set(), []
  while waiting or links:
    folder = (waiting or links).popleft()
    if file_key(folder) in seen:
      continue
    seen.add(file_key(folder))
    found.append(folder)
    for entry in _entries(folder):
      if entry.is_dir():
        (links if entry.is_symlink() else waiting).append(entry)
  return found


def _real_files(root: Path, entries: Iterable[Path]) -> list[Path]:
  """Returns the files among `entries`, which lie below `root`, each real file once."""
  names = collections.defaultdict(list)
  for entry in entries:
    if entry.is_file():
      names[file_key(entry)].append(entry)
    elif entry.is_symlink() and not entry.exists():
      warn_once(f"{readable(str(entry))} is a link to nothing: it is passed over")

  def needs_link(entry: Path) -> bool:
    real = os.path.join(os.path.realpath(root), entry.relative_to(root))
    return os.path.realpath(entry) != real

  return [
      min(same, key=lambda entry: (needs_link(entry), entry)) if len(same) > 1 else same[0]
      for same in names.values()
  ]


def _find_remote(
    place: epath.Path, field: str, suffixes: tuple[str, ...]
) -> tuple[epath.Path, list[epath.Path]]:
  if "**" in str(place):
    raise invalid(field, str(place), "a glob without ** where the files are in a bucket")
  root = place
  while _is_pattern(str(root)):
    root = root.parent
  if root != place:
    pattern = place.relative_to(root)
    return root, [
        file for file in root.glob(str(pattern))
        if file.is_file() and not _is_hidden(file.relative_to(root).parts, pattern.parts)
    ]
  if place.is_dir():
    return place, [f for f in _remote_files(place) if f.name.endswith(suffixes)]
  return place.parent, [place] if place.is_file() else []


def _is_hidden(names: Iterable[str], patterns: Iterable[str]) -> bool:
  """Returns whether any name begins with a dot that the pattern at its place does not spell."""
  pairs = zip(names, patterns, strict=True)
  return any(name.startswith(".") and not pattern.startswith(".") for name, pattern in pairs)


def _remote_files(folder: epath.Path) -> Iterator[epath.Path]:
  for entry in folder.iterdir():
    if entry == folder or entry.name.startswith("."):  # A bucket may list a folder in itself.
      continue
    if entry.is_dir():
      yield from _remote_files(entry)
    else:
      yield entry
