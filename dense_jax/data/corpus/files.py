"""One input file becomes shards: what each process of a job does, wherever it runs."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from dense_jax.config import invalid
from dense_jax.data.corpus.documents import PartNames, Reading, read_documents
from dense_jax.data.corpus.manifest import SHARDS, Source, from_json
from dense_jax.data.corpus.seen import HASH_BYTES, Seen, content_hash
from dense_jax.data.corpus.shards import Shard, ShardWriter, shard_name
from dense_jax.data.digests import digest_files, stamp_of
from dense_jax.errors import InputError
from dense_jax.files import is_remote, read_object, sync, temporary_beside, write_atomically

RESULTS = "files"
_GROUP_CHARACTERS = 1 << 20
_GROUP_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
  """Options on which the shards of a file depend, besides its content and the tokenizer.

  Attributes:
    reading: how its documents are read.
    heldout_every: n: one document in n is held out, by a hash of its text, so that equal texts are
      on the same side; 0 holds out none.
    deduplicate: whether a document that came before is left out.
  """

  reading: Reading
  heldout_every: int
  deduplicate: bool


@dataclasses.dataclass(frozen=True)
class Input:
  """An input file of a job.

  Attributes:
    number: its number in the job, by which its shards are named.
    path: where it is.
    name: its path below the folder of all inputs, fit to print.
    heldout: whether all of it is held out.
  """

  number: int
  path: str
  name: str
  heldout: bool

  @property
  def field(self) -> str:
    """The option that named it."""
    return "--heldout" if self.heldout else "--input"


@dataclasses.dataclass(frozen=True)
class Group:
  """Documents of one file that are encoded at a time.

  Attributes:
    texts, parts, heldout, sizes: of each document, its text, part, whether it is held out, and its
      UTF-8 bytes.
    values: part -> the value that it is named after.
    hashes: their content hashes, if documents are de-duplicated, else [].
    source: what the whole file is, after its last documents; else None.
    stamp: the file's size and times when it was opened; [] if it has none.
  """

  texts: list[str]
  parts: list[str]
  values: dict[str, str]
  heldout: list[bool]
  sizes: list[int]
  hashes: list[bytes]
  source: Source | None
  stamp: list[int]


@dataclasses.dataclass(frozen=True)
class FileResult:
  """An input file that is done, and its shards.

  Attributes:
    source: the file.
    stamp: its size and times, by which a job that goes on knows it again.
    shards: its shards.
    values: part -> the value that it is named after.
  """

  source: Source
  stamp: list[int]
  shards: list[Shard]
  values: dict[str, str] = dataclasses.field(default_factory=dict)


def read_groups(
    file: Input, settings: Settings, seen: Seen | None, names: PartNames,
    on_bad: Callable[[str, str], None],
) -> Iterator[Group]:
  """Yields a file's documents, and in the last group what the file is.

  Args:
    file: the file.
    settings: which documents are taken.
    seen: the documents of all files before, if the settings de-duplicate.
    names: the parts of all files before.
    on_bad: called with "NAME:LINE" and the reason for each line that is no document.

  Raises:
    InputError: the file cannot be read, or changed meanwhile, or two values make one part's name.
  """
  path = input_path(file)
  stamp = _stamp(path, file)
  counts = dict.fromkeys(("documents", "bad", "duplicates", "empty"), 0)

  def bad(place: str, why: str) -> None:
    counts["bad"] += 1
    on_bad(file.name + place, why)

  group, characters = _empty(stamp), 0
  for part, value, text in read_documents(path, file.field, settings.reading, bad):
    if not text:
      counts["empty"] += 1
      continue
    content = text.encode()
    known = b""
    if seen is not None or settings.heldout_every:
      known = content_hash(content)
    if seen is not None and not seen.add(known):
      counts["duplicates"] += 1
      continue
    counts["documents"] += 1
    names.add(part, value)
    every = 0 if file.heldout else settings.heldout_every
    held = file.heldout or bool(every and int.from_bytes(known[:8], "little") % every == 0)
    group.texts.append(text)
    group.parts.append(part)
    group.values[part] = value
    group.heldout.append(held)
    group.sizes.append(len(content))
    if seen is not None:
      group.hashes.append(known)
    characters += len(text)
    if characters >= _GROUP_CHARACTERS or len(group.texts) >= _GROUP_DOCUMENTS:
      yield group
      group, characters = _empty(stamp), 0
  (found,) = digest_files([path], file.field, "")
  if _stamp(path, file) != stamp:
    raise invalid(file.field, file.name, "a file that does not change while it is read")
  source = Source(file.name, file.heldout, found.size, found.sha256, **counts)
  yield dataclasses.replace(group, source=source)


def _empty(stamp: list[int]) -> Group:
  return Group([], [], {}, [], [], [], None, stamp)


def input_path(file: Input) -> Any:
  """Returns where a file is, here or in a bucket."""
  return epath.Path(file.path) if is_remote(file.path) else Path(file.path)


def _stamp(path: Any, file: Input) -> list[int]:
  try:
    return [*(stamp_of(path) or ())]
  except OSError as error:
    raise invalid(file.field, file.name, f"a file that can be read ({error})") from error


class FileWriter:
  """Writes the shards of one input file, one for each part and side."""

  def __init__(self, folder: Path, file: Input, dtype: np.dtype) -> None:
    """Begins in the corpus's folder."""
    self._folder, self._file, self._dtype = folder, file, dtype
    self._writers: dict[tuple[bool, str], ShardWriter] = {}
    self._hashes = temporary_beside(hashes_file(folder, file.number))
    self._hashed = False
    self._values: dict[str, str] = {}

  def add(self, group: Group, rows: list[bytes]) -> None:
    """Adds documents and their ids."""
    for part, held, size, ids in zip(group.parts, group.heldout, group.sizes, rows, strict=True):
      self._writer(held, part).add(ids, size)
    self._values |= group.values
    if group.hashes:
      self._hashed = True
      with self._hashes.open("ab") as file:
        file.write(b"".join(group.hashes))

  def _writer(self, held: bool, part: str) -> ShardWriter:
    if (held, part) not in self._writers:
      self._writers[held, part] = ShardWriter(
          self._folder / SHARDS, shard_name(held, part, self._file.number), part, held, self._dtype
      )
    return self._writers[held, part]

  def finish(self, group: Group) -> FileResult:
    """Gives the shards their names, then writes the file's result, which says that it is done."""
    assert group.source is not None
    shards = [self._writers[key].finish() for key in sorted(self._writers)]
    sync(self._folder / SHARDS)
    if self._hashed:
      sync(self._hashes)
      os.replace(self._hashes, hashes_file(self._folder, self._file.number))
    result = FileResult(group.source, group.stamp, shards, self._values)
    content = json.dumps(dataclasses.asdict(result), indent=1) + "\n"
    write_atomically(result_file(self._folder, self._file.number), content.encode())
    return result

  def abandon(self) -> None:
    """Removes what is not finished."""
    for writer in self._writers.values():
      writer.abandon()
    self._hashes.unlink(missing_ok=True)


def result_file(folder: Path, number: int) -> Path:
  """Returns the path of the result of a job's file."""
  return folder / RESULTS / f"{number:06d}.json"


def hashes_file(folder: Path, number: int) -> Path:
  """Returns the path of the content hashes of a job's file."""
  return folder / RESULTS / f"{number:06d}.hashes"


def finished(folder: Path, file: Input, settings: Settings) -> FileResult | None:
  """Returns the result of a file that a job has done before; None means that it is to be done.

  Raises:
    InputError: the result is damaged, or the file has changed since.
  """
  path = result_file(folder, file.number)
  if not path.is_file():
    return None
  values = read_object(path, "what prepare wrote")
  try:
    named = values.pop("values", {})  # A job that an older version began has none.
    if values.keys() != {"source", "stamp", "shards"} or not isinstance(values["shards"], list):
      raise ValueError("it has other keys")
    if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values()):
      raise ValueError("its values are no object of strings")
    if not isinstance(values["stamp"], list):
      raise ValueError("its stamp is no list")
    result = FileResult(
        from_json(Source, values["source"]), values["stamp"],
        [from_json(Shard, shard) for shard in values["shards"]], named,
    )
  except ValueError as error:
    raise InputError(
        f"{path} is damaged ({error}): remove it, and the file that it tells of is prepared again"
    ) from error
  if result.source.name != file.name or result.stamp != _stamp(input_path(file), file):
    raise invalid(
        file.field, file.name, f"{result.source.name} as it was when it was prepared. Remove "
        f"{path}, and it is prepared again"
    )
  wanted = [folder / SHARDS / shard.name for shard in result.shards]
  if settings.deduplicate and result.source.documents:
    wanted.append(hashes_file(folder, file.number))
    if wanted[-1].is_file() and wanted[-1].stat().st_size != HASH_BYTES * result.source.documents:
      return None
  return result if all(each.is_file() for each in wanted) else None
