"""Text documents: where they are found, how they are read, what is held out.

A source is read from its files each time it is iterated over, one document after the
other, so that memory holds one document (a .txt file is one) and never a corpus.
"""

import contextlib
import dataclasses
import functools
import glob
import gzip
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from dense_jax.config import DataConfig, invalid
from dense_jax.data.cache import digest
from dense_jax.data.digests import FileDigest, digest_files
from dense_jax.files import is_remote, make_path

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_VALID_PATH = f'"stdlib", or a file, directory or glob of {", ".join(SUFFIXES)}'
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclasses.dataclass(frozen=True)
class Document:
  """One text.

  Attributes:
    name: the file's path below the source's root, with ":line" for a line of a .jsonl.
    text: not empty. It is the file's text as it stands (line ends, a byte order mark);
      only what is not valid UTF-8 has become U+FFFD.
  """

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Part:
  """Which part of the documents a source gives.

  Attributes:
    unit: "document" splits between documents, "text" inside each of them.
    every: every n-th document, or the last n-th of each text, is held out.
    heldout: the held-out part, else the rest.
  """

  unit: str
  every: int
  heldout: bool

  def take(self, index: int, text: str) -> str:
    """What belongs to this part of document number `index`; may be empty."""
    if self.unit == "document":
      return text if (index % self.every == 0) == self.heldout else ""
    border = _line_border(text, len(text) - len(text) // self.every)
    return text[border:] if self.heldout else text[:border]


def _line_border(text: str, target: int) -> int:
  """The start of a line nearest to `target`; `target` itself in a text of one line."""
  borders = (text.rfind("\n", 0, target) + 1, text.find("\n", target) + 1)
  inner = [border for border in borders if 0 < border < len(text)]
  return min(inner, key=lambda border: abs(border - target), default=target)


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Documents that can be iterated over any number of times, always in one order.

  Attributes:
    root: the directory below which the files' names are told; in a bucket an `epath.Path`.
    files: in sorted order of those names.
    field: the config field that named the files, for error messages.
    part: the part of the documents to give; None gives all.
    cache_dir: where digests of the files' contents are kept; empty keeps none.
  """

  root: Path
  files: tuple[Path, ...]
  field: str
  part: Part | None = None
  cache_dir: str = ""

  def __iter__(self) -> Iterator[Document]:
    """Yields the documents that are not empty.

    Raises:
      InputError: a file that cannot be read, a line that is no JSON with a text.
    """
    index = 0
    for file in self.files:
      for suffix, text in _texts(file, self.field):
        if not text:
          continue
        taken = self.part.take(index, text) if self.part else text
        index += 1
        if taken:
          yield Document(_name(self.root, file) + suffix, taken)

  @functools.cached_property
  def digests(self) -> tuple[FileDigest, ...]:
    """What each file holds."""
    return digest_files(self.files, self.field, self.cache_dir)

  @property
  def names(self) -> tuple[str, ...]:
    """Each file's path below the root."""
    return tuple(_name(self.root, file) for file in self.files)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex identity of the text: what the files hold, in order, how they are read, and the part.

    It does not depend on the names of files and folders but for the suffix that says how a file
    is read.
    """
    parts: list[str] = []
    for file, held in zip(self.files, self.digests, strict=True):
      parts += [file.suffix, held.sha256]
    return digest("source", str(self.part), *parts)


def _name(root: Path, file: Path) -> str:
  """The file's path below the root; bytes that are not UTF-8 are written as \\xNN."""
  name = file.relative_to(root).as_posix()
  return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _resolve(file: Path) -> Path:
  return file if is_remote(file) else file.resolve()


def _texts(file: Path, field: str) -> Iterator[tuple[str, str]]:
  """Yields (suffix of the document's name, text) for each document of a file."""
  try:
    if file.name.endswith((".txt", ".py")):
      yield "", file.read_bytes().decode("utf-8", errors="replace")
      return
    with _open_lines(file, field) as lines:
      for number, line in enumerate(lines, 1):
        if not line.isspace():
          yield f":{number}", _json_text(line, file, number, field)
  except (OSError, EOFError, zlib.error) as error:
    raise invalid(field, str(file), f"a file that can be read ({error})") from error


@contextlib.contextmanager
def _open_lines(file: Path, field: str) -> Iterator[BinaryIO]:
  """A .jsonl, .jsonl.gz or .jsonl.zst file, open for reading its lines."""
  if file.suffix == ".gz":
    with file.open("rb") as packed, gzip.open(packed, "rb") as lines:
      yield io.BufferedReader(lines)
  elif file.suffix == ".zst":
    with _open_zst(file, field) as lines:
      yield lines
  else:
    with file.open("rb") as lines:
      yield lines


@contextlib.contextmanager
def _open_zst(file: Path, field: str) -> Iterator[BinaryIO]:
  import zstandard  # only those who read .zst need it

  try:
    with file.open("rb") as packed:
      # A file that was written in parts, or appended to, has several frames.
      reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
      yield io.BufferedReader(reader)
  except zstandard.ZstdError as error:
    raise invalid(field, str(file), f"a file that can be read ({error})") from error


def _json_text(line: bytes, file: Path, number: int, field: str) -> str:
  try:
    text = json.loads(line.decode("utf-8"))["text"]
    if not isinstance(text, str):
      raise TypeError("`text` is not a string")
  except (ValueError, KeyError, TypeError) as error:
    raise invalid(
        field, str(file),
        f'a JSON object with a string "text" in every line; line {number} is {line[:60]!r}',
    ) from error
  # JSON can spell half of a surrogate pair, which is no text.
  return text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace")


def _find_stdlib(field: str, cache_dir: str) -> TextSource:
  root = Path(sysconfig.get_paths()["stdlib"])
  files = [f for f in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(f.relative_to(root).parts)]
  if not files:
    raise invalid(field, "stdlib", f"another path: {root} holds no Python sources here")
  return _sorted_source(root, files, field, cache_dir)


def _sorted_source(root: Path, files: list[Path], field: str, cache_dir: str) -> TextSource:
  files = sorted(files, key=lambda file: file.relative_to(root).as_posix())
  return TextSource(root, tuple(files), field, cache_dir=cache_dir)


def find(path: str, field: str, cache_dir: str = "") -> TextSource:
  """All documents of a path.

  Args:
    path: "stdlib", the `*.py` of Python's standard library without its tests; or a file,
      a directory (with those below it; files of other suffixes are passed over) or a glob
      (`**` goes down) of .txt, .jsonl, .jsonl.gz and .jsonl.zst files. gs://BUCKET/... is any
      of the three, but for `**`.
    field: the config field the path is from, for error messages.

  Raises:
    InputError: nothing there, or a file of another kind.
  """
  if path == "stdlib":
    return _find_stdlib(field, cache_dir)
  root, files = _find_remote(path, field) if is_remote(path) else _find_local(path)
  if not files:
    raise invalid(field, path, f"{_VALID_PATH}; no such file was found")
  for file in files:
    if not file.name.endswith(SUFFIXES):
      raise invalid(field, path, f"{_VALID_PATH}; {file.name} has another suffix")
  return _sorted_source(root, files, field, cache_dir)


def _find_local(path: str) -> tuple[Path, list[Path]]:
  place = Path(path).expanduser()
  if place.is_dir():
    return place, [f for f in place.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file()]
  matches = [str(place)] if place.is_file() else glob.glob(str(place), recursive=True)
  files = [Path(match) for match in matches if os.path.isfile(match)]
  return Path(os.path.commonpath([file.parent for file in files])) if files else place, files


def _find_remote(path: str, field: str) -> tuple[epath.Path, list[epath.Path]]:
  place = make_path(path, field)
  if "**" in path:
    raise invalid(field, path, "a glob without ** where the files are in a bucket")
  root = place
  while re.search(r"[*?[]", str(root)):
    root = root.parent
  if root != place:
    return root, [f for f in root.glob(str(place.relative_to(root))) if f.is_file()]
  if place.is_dir():
    return place, [f for f in _files_below(place) if f.name.endswith(SUFFIXES)]
  return place.parent, [place] if place.is_file() else []


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
  for entry in folder.iterdir():
    if not entry.is_dir():
      yield entry
    elif entry != folder:  # A bucket may list a folder in itself.
      yield from _files_below(entry)


def split(config: DataConfig) -> tuple[TextSource, TextSource]:
  """The training documents and the held-out documents.

  With `heldout_path` these are two sets of files. Else, with n = `heldout_every`: every
  n-th file in sorted order, from the first one, is held out; with fewer than n files
  every n-th document; with fewer than n documents the last 1/n of each document's text,
  cut at the nearest line's start.

  Raises:
    InputError: no text is found, or none is left for one of the two, or `heldout_path`
      names files that are trained on.
  """
  source = find(config.path, "config.data.path", config.cache_dir)
  every = config.heldout_every
  if config.heldout_path:
    train, heldout = source, find(
        config.heldout_path, "config.data.heldout_path", config.cache_dir
    )
    shared = set(map(_resolve, train.files)) & set(map(_resolve, heldout.files))
    if shared:
      raise invalid(
          "config.data.heldout_path", config.heldout_path,
          f"files that are not in config.data.path as well, as {min(shared)} is",
      )
  elif len(source.files) >= every:
    held = source.files[::every]
    train = dataclasses.replace(
        source, files=tuple(f for i, f in enumerate(source.files) if i % every)
    )
    heldout = dataclasses.replace(source, files=held)
  else:
    unit = "document" if _has_documents(source, every) else "text"
    train = dataclasses.replace(source, part=Part(unit, every, heldout=False))
    heldout = dataclasses.replace(source, part=Part(unit, every, heldout=True))
  for name, part in (("training", train), ("held-out", heldout)):
    if not _has_documents(part, 1):
      path = config.heldout_path if part.field.endswith("heldout_path") else config.path
      raise invalid(part.field, path, f"files with text; the {name} part of it is empty")
  return train, heldout


def _has_documents(source: TextSource, count: int) -> bool:
  """Whether there are at least `count`; reads no further than that."""
  return any(number >= count for number, _ in enumerate(source, 1))
