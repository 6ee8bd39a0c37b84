"""Text documents: where they are found, how they are read, what is held out.

A source is read from its files each time it is iterated over, one document after the
other, so that memory holds one document (a .txt file is one) and never a corpus.
"""

import dataclasses
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dense_jax.config import DataConfig, invalid
from dense_jax.data.cache import digest
from dense_jax.data.digests import FileDigest, digest_files
from dense_jax.data.finding import file_key, find_files, readable
from dense_jax.data.reading import read_texts

_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclasses.dataclass(frozen=True)
class Document:
  """One text.

  Attributes:
    name: the file's path below the source's root, with ":line" for a line of a .jsonl.
    text: not empty. It is the file's text as it stands (line ends, a byte order mark of UTF-8),
      but that what is not valid UTF-8 has become U+FFFD; see `read_texts`.
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
    for file, name in zip(self.files, self.names, strict=True):
      for suffix, text in read_texts(file, self.field):
        if not text:
          continue
        taken = self.part.take(index, text) if self.part else text
        index += 1
        if taken:
          yield Document(name + suffix, taken)

  @functools.cached_property
  def digests(self) -> tuple[FileDigest, ...]:
    """What each file holds."""
    return digest_files(self.files, self.field, self.cache_dir)

  @property
  def names(self) -> tuple[str, ...]:
    r"""Each file's path below the root; what is not UTF-8 in it is written as \xNN."""
    return tuple(readable(file.relative_to(self.root).as_posix()) for file in self.files)

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

  def check_unchanged(self) -> None:
    """Makes sure that the files hold what they held when their digests were taken.

    Raises:
      InputError: naming a file that does not.
    """
    now = digest_files(self.files, self.field, self.cache_dir)
    for name, before, after in zip(self.names, self.digests, now, strict=True):
      if before != after:
        raise invalid(self.field, name, "a file that does not change while it is read")


def _stdlib_files(field: str) -> tuple[Path, list[Path]]:
  root = Path(sysconfig.get_paths()["stdlib"])
  files = [f for f in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(f.relative_to(root).parts)]
  if not files:
    raise invalid(field, "stdlib", f"another path: {root} holds no Python sources here")
  return root, files


def find(path: str, field: str, cache_dir: str = "") -> TextSource:
  """All documents of a path.

  Args:
    path: "stdlib", the `*.py` of Python's standard library without its tests; or what
      `find_files` takes.
    field: the config field the path is from, for error messages.
    cache_dir: `config.data.cache_dir`, where digests of the files' contents are kept; empty keeps
      none.

  Raises:
    InputError: nothing there, or a file of another kind.
  """
  root, files = _stdlib_files(field) if path == "stdlib" else find_files(path, field)
  files = sorted(files, key=lambda file: file.relative_to(root).as_posix())
  return TextSource(root, tuple(files), field, cache_dir=cache_dir)


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
    trained_on = {file_key(file) for file in train.files}
    shared = next((file for file in heldout.files if file_key(file) in trained_on), None)
    if shared:
      raise invalid(
          "config.data.heldout_path", config.heldout_path,
          f"files that are not in config.data.path as well, as {readable(str(shared))} is",
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
