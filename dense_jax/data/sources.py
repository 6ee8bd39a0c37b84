"""Sources of documents (texts, or examples to fine-tune on), and their split into two parts.

Each iteration over a source reads its files again, one document at a time (a .txt file is one
document), so memory never holds a whole corpus.
"""

import dataclasses
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dense_jax.config import DataConfig, invalid
from dense_jax.data.cache import digest
from dense_jax.data.digests import FileDigest, digest_files
from dense_jax.data.examples import check_suffixes, read_examples
from dense_jax.data.finding import file_key, find_files, readable
from dense_jax.data.reading import read_texts
from dense_jax.data.templates import Template, Turn, template_of

_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, or one example to fine-tune on.

  Attributes:
    name: the file's path below the source's root, with ":line" for a line of a .jsonl.
    text: the text exactly as in the file, including line ends and a UTF-8 byte order mark, except
      that invalid UTF-8 has become U+FFFD (see `read_texts`); never empty. Of an example, all its
      turns joined.
    turns: an example's prompts, as the template lays them out, and responses; () for a text.
  """

  name: str
  text: str
  turns: tuple[Turn, ...] = ()

  @property
  def target_text(self) -> str:
    """The text that the loss counts: that of an example is its responses."""
    return "".join(turn.response for turn in self.turns) if self.turns else self.text


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the documents of a source: the held-out part, or the rest.

  Attributes:
    unit: "document" splits between documents, "text" splits inside each document.
    every: n: every n-th document, or the last 1/n of each text, is held out.
    heldout: true for the held-out part, false for the rest.
  """

  unit: str
  every: int
  heldout: bool

  def take(self, index: int, text: str) -> str:
    """Returns the text of document number `index` that is in this part; may be empty."""
    if self.unit == "document":
      return text if (index % self.every == 0) == self.heldout else ""
    border = _line_border(text, len(text) - len(text) // self.every)
    return text[border:] if self.heldout else text[:border]


def _line_border(text: str, target: int) -> int:
  """Returns the start of a line that is nearest to `target`, or `target` if there is one line."""
  borders = (text.rfind("\n", 0, target) + 1, text.find("\n", target) + 1)
  inner = [border for border in borders if 0 < border < len(text)]
  return min(inner, key=lambda border: abs(border - target), default=target)


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Documents that can be iterated over any number of times, always in the same order.

  Attributes:
    root: the directory relative to which files are named; in a bucket, an `epath.Path`.
    files: the files, sorted by name.
    field: the config field that named the files, for error messages.
    part: the part of the documents to yield; None means all.
    cache_dir: where digests of the files' contents are cached; "" disables the cache.
    template: of the examples that the files hold; None means that they hold plain text.
  """

  root: Path
  files: tuple[Path, ...]
  field: str
  part: Part | None = None
  cache_dir: str = ""
  template: Template | None = None

  def __iter__(self) -> Iterator[Document]:
    """Yields the documents that are not empty.

    Raises:
      InputError: a file cannot be read, or a line is not a JSON object with a `text`, or with an
        example (see `read_examples`).
    """
    index = 0
    for file, name in zip(self.files, self.names, strict=True):
      for suffix, text, turns in self._read(file):
        if not text:
          continue
        taken = self.part.take(index, text) if self.part else text
        index += 1
        if taken:
          yield Document(name + suffix, taken, turns)

  def _read(self, file: Path) -> Iterator[tuple[str, str, tuple[Turn, ...]]]:
    """Yields the suffix of the name, the text and the turns of each document of a file."""
    if self.template is None:
      for suffix, text in read_texts(file, self.field):
        yield suffix, text, ()
      return
    for suffix, turns in read_examples(file, self.field, self.template):
      yield suffix, "".join(text for turn in turns for text in turn), turns

  @functools.cached_property
  def digests(self) -> tuple[FileDigest, ...]:
    """Digest of each file's contents, in the order of `files`."""
    return digest_files(self.files, self.field, self.cache_dir)

  @property
  def names(self) -> tuple[str, ...]:
    r"""Path of each file relative to the root; bytes that are not UTF-8 are written as \xNN."""
    return tuple(readable(file.relative_to(self.root).as_posix()) for file in self.files)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex digest of the files' contents, in order, their suffixes, the part and the template.

    Apart from the suffix, which determines how a file is read, names of files and folders do not
    matter.
    """
    parts: list[str] = []
    for file, held in zip(self.files, self.digests, strict=True):
      parts += [file.suffix, held.sha256]
    if self.template is not None:
      parts.append(str(self.template))
    return digest("source", str(self.part), *parts)

  def check_unchanged(self) -> None:
    """Checks that the files have not changed since `digests` was computed.

    Raises:
      InputError: a file has changed; the error names it.
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


def find(
    path: str, field: str, cache_dir: str = "", template: Template | None = None
) -> TextSource:
  """Returns the source of all documents of a path.

  Args:
    path: "stdlib", for the `*.py` files of Python's standard library without its tests; or any
      path that `find_files` accepts.
    field: the config field the path is from, for error messages.
    cache_dir: `config.data.cache_dir`, where digests of the files' contents are cached; ""
      disables the cache.
    template: of the examples that the files hold; None means that they hold plain text.

  Raises:
    InputError: no text was found, see `find_files`; or a file that is to hold examples is no
      .jsonl.
  """
  root, files = _stdlib_files(field) if path == "stdlib" else find_files(path, field)
  if template is not None:
    check_suffixes(files, field)
  files = sorted(files, key=lambda file: file.relative_to(root).as_posix())
  return TextSource(root, tuple(files), field, cache_dir=cache_dir, template=template)


def split(config: DataConfig) -> tuple[TextSource, TextSource]:
  """Returns the training source and the held-out source.

  With `heldout_path`, these are two sets of files. Otherwise, with n = `heldout_every`:

  - if there are at least n files, every n-th one in sorted order, from the first, is held out;
  - else, if there are at least n documents, every n-th one, from the first, is held out;
  - else the last 1/n of each document's text is held out, cut at the nearest start of a line. An
    example is not cut: fewer than n examples are an error.

  Raises:
    InputError: no text was found, one of the two sources would be empty, `heldout_path` names
      files that are trained on, or `config.template` is not valid.
  """
  template = template_of(config)
  source = find(config.path, "config.data.path", config.cache_dir, template)
  every = config.heldout_every
  if config.heldout_path:
    train, heldout = source, find(
        config.heldout_path, "config.data.heldout_path", config.cache_dir, template
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
    if template is not None and unit == "text":
      count = sum(1 for _ in source)
      raise invalid(
          "config.data.heldout_every", every,
          f"an integer >= 2 and <= the number of examples in config.data.path, {count}; or other "
          "examples in config.data.heldout_path",
      )
    train = dataclasses.replace(source, part=Part(unit, every, heldout=False))
    heldout = dataclasses.replace(source, part=Part(unit, every, heldout=True))
  for name, part in (("training", train), ("held-out", heldout)):
    if not _has_documents(part, 1):
      path = config.heldout_path if part.field.endswith("heldout_path") else config.path
      raise invalid(part.field, path, f"files with text; the {name} part of it is empty")
  return train, heldout


def _has_documents(source: TextSource, count: int) -> bool:
  """Returns whether `source` has at least `count` documents; reads no further than that."""
  return any(number >= count for number, _ in enumerate(source, 1))
