"""The documents of a file, and the part of the corpus that each belongs to."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dense_jax.config import invalid
from dense_jax.config.mixture import NAME
from dense_jax.data.finding import SUFFIXES, find_files, readable
from dense_jax.data.reading import named_errors, read_lines, read_texts, whole_characters
from dense_jax.errors import InputError

PARQUET = ".parquet"
# The part of documents that no field says the part of.
TEXT = "text"
_ROWS = 256
OnBad = Callable[[str, str], None]


@dataclasses.dataclass(frozen=True)
class Reading:
  """Rules by which documents are read.

  Attributes:
    column: the key of a .jsonl's object, or the column of a .parquet, that has the text.
    part_field: the key that says which part a document belongs to, with dots between keys of
      objects in objects, such as "meta.pile_set_name"; "" puts all into one part, "text".
    parts: value of that key -> the part's name; "*" stands for all other values. Empty names a
      part after its value's ASCII letters and digits.
  """

  column: str = "text"
  part_field: str = ""
  parts: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    for value, name in self.parts.items():
      if not isinstance(name, str) or not NAME.fullmatch(name):
        raise invalid("--parts", {value: name}, "names of letters, digits, dots, _ and -")
    if self.parts and not self.part_field:
      raise invalid("--parts", dict(self.parts), "nothing without --part-field")

  def part_of(self, values: Any) -> tuple[str, str]:
    """Returns the part that a document belongs to, and the one value that may have this name.

    The latter is the name itself where no value makes it.

    Raises:
      ValueError: no part is named, or one that a file cannot be called by.
    """
    if not self.part_field:
      return TEXT, TEXT
    for key in self.part_field.split("."):
      values = values.get(key) if isinstance(values, dict) else None
    if not isinstance(values, str):
      raise ValueError(f"it has no string {self.part_field!r}")
    if not self.parts:
      name = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in values).split())
    else:
      name = self.parts.get(values, self.parts.get("*", ""))
    if not NAME.fullmatch(name):
      raise ValueError(f"{self.part_field} = {values[:60]!r} belongs to no part")
    return name, name if self.parts else values


class PartNames:
  """The values that parts are named after: no two may come to one name, as C, C++ and C# do."""

  def __init__(self, known: Iterable[Mapping[str, str]]) -> None:
    """Takes the parts of files that are done: of each, part -> value.

    Raises:
      InputError: see `add`.
    """
    self._values: dict[str, str] = {}
    for values in known:
      for name, value in values.items():
        self.add(name, value)

  def add(self, name: str, value: str) -> None:
    """Notes that a value has made a part's name.

    Raises:
      InputError: another one has made it as well.
    """
    other = self._values.setdefault(name, value)
    if other != value:
      raise InputError(
          f"--part-field: the values {other[:60]!r} and {value[:60]!r} would both be the part "
          f"{name!r}. Expected --parts FILE.json, which names the part of each value, and a new "
          "--output"
      )


def find_inputs(path: str, field: str) -> tuple[Path, list[Path]]:
  """Finds the files of a corpus; see `find_files`. Returns their folder, and the files by name."""
  root, files = find_files(path, field, (*SUFFIXES, PARQUET))
  return root, sorted(files, key=lambda file: readable(file.relative_to(root).as_posix()))


def read_documents(
    file: Path, field: str, reading: Reading, on_bad: OnBad
) -> Iterator[tuple[str, str, str]]:
  """Yields (part, value, text) of each document of a file; texts may be empty.

  Part and value are those of `Reading.part_of`.

  Args:
    file: a .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file.
    field: the option that named it, for error messages.
    reading: how it is read.
    on_bad: called with ":" and the number of each line (or row, from 1 on) that is no document, and
      the reason.

  Raises:
    InputError: the file as a whole cannot be read: it is cut off or damaged, has a line of more
      than 128 MiB, or no such column.
  """
  if file.suffix == PARQUET:
    yield from _read_parquet(file, field, reading, on_bad)
  elif file.suffix == ".txt":
    if reading.part_field:
      raise invalid("--part-field", reading.part_field,
                    f"nothing where files are plain text, as {readable(str(file))} is")
    for _, text in read_texts(file, field):
      yield TEXT, TEXT, text
  else:
    valid = f'a JSON object with a string "{reading.column}"'
    for _, document in read_lines(file, field, valid, lambda v: _document(v, reading), on_bad):
      yield document


def _document(values: Any, reading: Reading) -> tuple[str, str, str]:
  text = values.get(reading.column) if isinstance(values, dict) else None
  if not isinstance(text, str):
    raise ValueError(f"it has no string {reading.column!r}")
  return *reading.part_of(values), whole_characters(text)


def check_packages(files: list[Path]) -> None:
  """Checks that what reads the files is installed.

  Raises:
    InputError: a package is missing; the error names the extra.
  """
  if any(file.suffix == PARQUET for file in files) and not importlib.util.find_spec("pyarrow"):
    raise InputError(
        f"a {PARQUET} file needs the package pyarrow: pip install -e '.[parquet]'"
    )


def _read_parquet(
    file: Path, field: str, reading: Reading, on_bad: OnBad
) -> Iterator[tuple[str, str, str]]:
  check_packages([file])
  import pyarrow  # An optional dependency, needed for .parquet only.
  import pyarrow.parquet

  # Of objects in objects, only what says the part: the rest may be anything.
  columns = [reading.column, *filter(None, [reading.part_field])]
  outermost = [reading.column, *filter(None, [reading.part_field.partition(".")[0]])]
  number = 0
  try:
    with named_errors(file, field), file.open("rb") as raw:
      table = pyarrow.parquet.ParquetFile(raw)
      for name in outermost:
        if name not in table.schema_arrow.names:
          raise invalid(field, str(file), f"a file with a column {name!r}; it has "
                        f"{', '.join(table.schema_arrow.names)}")
      for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
        for row in range(batch.num_rows):
          number += 1
          try:
            document = _document(batch.slice(row, 1).to_pylist()[0], reading)
          except (ValueError, OverflowError) as error:
            on_bad(f":{number}", str(error))
            continue
          yield document
  except pyarrow.ArrowException as error:
    raise invalid(field, str(file), f"a .parquet file that can be read ({error})") from error
