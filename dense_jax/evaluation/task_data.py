"""Finds and reads the data files of tasks in a folder that the user names; downloads nothing."""

import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dense_jax.config import invalid
from dense_jax.errors import InputError
from dense_jax.evaluation.adapters import ADAPTERS, FORMS
from dense_jax.evaluation.tasks import TASKS, Item, Record, make_item
from dense_jax.files import make_path, parse_json

# Where files are looked for, below the folder.
_BELOW = ("", "eval", "text")


@dataclasses.dataclass(frozen=True)
class Files:
  """The names that a task's data files may have; the first one that exists is read.

  Each is also looked for with .gz at its end, and may hold a *.

  Attributes:
    scored: the split that is scored.
    examples: the splits that examples of few-shot prompts come from, the preferred one first. If
      none of them exists, they come from the scored file, without the item itself.
  """

  scored: tuple[str, ...]
  examples: tuple[str, ...] = ()


FILES: Mapping[str, Files] = {
    "wikitext": Files(("wikitext2_raw_test.txt", "wiki.test.raw", "wikitext-2-raw/wiki.test.raw")),
    "lambada": Files(("lambada_openai_test.jsonl", "lambada_test.jsonl")),
    "hellaswag": Files(("hellaswag_val.jsonl",), ("hellaswag_train.jsonl",)),
    "piqa": Files(
        ("piqa_valid.jsonl", "piqa/valid.jsonl", "physicaliqa-train-dev/dev.jsonl"),
        ("piqa_train.jsonl", "piqa/train.jsonl", "physicaliqa-train-dev/train.jsonl"),
    ),
    "winogrande": Files(
        ("winogrande_dev.jsonl", "winogrande_1.1/dev.jsonl"),
        ("winogrande_train.jsonl", "winogrande_1.1/train_xl.jsonl"),
    ),
    "arc_easy": Files(
        ("arc_easy_test.jsonl", "ARC-Easy/ARC-Easy-Test.jsonl"),
        ("arc_easy_train.jsonl", "ARC-Easy/ARC-Easy-Train.jsonl", "arc_easy_validation.jsonl",
         "ARC-Easy/ARC-Easy-Dev.jsonl"),
    ),
    "arc_challenge": Files(
        ("arc_challenge_test.jsonl", "ARC-Challenge/ARC-Challenge-Test.jsonl"),
        ("arc_challenge_train.jsonl", "ARC-Challenge/ARC-Challenge-Train.jsonl",
         "arc_challenge_validation.jsonl", "ARC-Challenge/ARC-Challenge-Dev.jsonl"),
    ),
    "boolq": Files(
        ("boolq_dev.jsonl", "BoolQ/val.jsonl"), ("boolq_train.jsonl", "BoolQ/train.jsonl")
    ),
    "copa": Files(("copa_dev.jsonl", "COPA/val.jsonl"), ("copa_train.jsonl", "COPA/train.jsonl")),
    "openbookqa": Files(
        ("openbookqa_test.jsonl", "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"),
        ("openbookqa_train.jsonl", "OpenBookQA-V1-Sep2018/Data/Main/train.jsonl",
         "openbookqa_validation.jsonl", "OpenBookQA-V1-Sep2018/Data/Main/dev.jsonl"),
    ),
    "storycloze": Files(
        ("cloze_test_val__*.csv", "storycloze_val.csv"), ("storycloze_train.csv",)
    ),
}


@dataclasses.dataclass(frozen=True)
class TaskData:
  """The items of a task.

  Attributes:
    task: the task's name.
    shots: examples in each prompt.
    items: the items to score.
    total: the items that the file has.
    files: path -> SHA-256 of each file that was read.
  """

  task: str
  shots: int
  items: tuple[Item, ...]
  total: int
  files: Mapping[str, str]

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of the items: of all that is scored."""
    return hashlib.sha256(repr((self.task, self.items)).encode()).hexdigest()


def load_task(
    name: str, folder: str, *, field: str = "--data", shots: int = 0, limit: int = 0
) -> TaskData:
  """Reads the items of a task.

  The examples of few-shot prompts are the first ones of the training file, or of the validation
  file, or else of the scored file, where an item is not among its own examples. They are the same
  for all items (the harness's sampler `first_n`), so that they are read once. Documents have none.

  Args:
    name: the task's name.
    folder: the folder of data files; they may be in its folders eval and text.
    field: the option or key that named the folder, for error messages.
    shots: examples in each prompt.
    limit: the first items that are taken; 0 means all.

  Raises:
    InputError: a file is missing or malformed, or has too few examples.
  """
  task = TASKS[name]
  shots = 0 if task.kind == "document" else shots
  scored, source = find_task_files(name, folder, field)
  records = read_records(name, scored)
  read = {str(scored): _digest(scored)}
  examples, own = records, True
  if shots and source is not None:
    examples, own = read_records(name, source), False
    read[str(source)] = _digest(source)
  if shots > len(examples) - own:
    raise invalid("--shots", shots, f"at most {len(examples) - own}, the examples for {name}")
  items = []
  for index, record in enumerate(records[: limit or None]):
    others = examples
    if own and index <= shots:
      others = [other for other in records[: shots + 1] if other is not record]
    items.append(make_item(task, record, others[:shots]))
  return TaskData(name, shots, tuple(items), len(records), read)


def find_task_files(
    name: str, folder: str, field: str = "--data"
) -> tuple[epath.Path, epath.Path | None]:
  """Returns a task's file to score, and the file of its examples, or None where there is none.

  Raises:
    InputError: there is no file to score.
  """
  files = FILES[name]
  scored = _find(folder, files.scored, field)
  if scored is None:
    raise invalid(
        field, folder, f"a folder with {' or '.join(files.scored)} in it, or in its folders eval "
        f"or text, for the task {name}",
    )
  return scored, _find(folder, files.examples, field)


def read_records(name: str, path: epath.Path) -> list[Record]:
  """Reads a task's file.

  Raises:
    InputError: the file cannot be read, holds nothing, or a line is malformed; the error names the
      file, the line and the expected form.
  """
  read = _read_pages if name == "wikitext" else (
      _read_csv if path.name.removesuffix(".gz").endswith(".csv") else _read_json_lines)
  records: list[Record] = []
  for line, values in read(path):
    try:
      if name == "piqa" and "label" not in values:
        values = {**values, "label": _label(path, len(records))}
      records.append(ADAPTERS[name](values))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
      if isinstance(error, InputError):
        raise
      missing = f"no {error}" if isinstance(error, KeyError) else str(error)
      raise _malformed(path, line, missing, FORMS[name]) from error
  if not records:
    raise _malformed(path, 1, "it holds nothing", FORMS[name])
  return records


def _find(folder: str, names: tuple[str, ...], field: str) -> epath.Path | None:
  """Returns the first of the files that exists."""
  root = make_path(folder, field)
  if not root.is_dir():
    raise invalid(field, folder, "a folder")
  for name in names:
    for below in _BELOW:
      for ending in ("", ".gz"):
        place = root / below if below else root
        found = sorted(place.glob(name + ending)) if "*" in name else [place / (name + ending)]
        if found and found[0].is_file():
          return epath.Path(found[0])
  return None


def _content(path: epath.Path) -> bytes:
  try:
    content = path.read_bytes()
    return gzip.decompress(content) if path.name.endswith(".gz") else content
  except (OSError, EOFError, zlib.error) as error:
    raise InputError(f"{path} cannot be read: {error}") from error


def _digest(path: epath.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _decoded(path: epath.Path, form: str) -> str:
  content = _content(path)
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b"\n") + 1
    raise _malformed(path, line, "it is not UTF-8", form) from error


def _malformed(path: epath.Path, line: int, problem: str, form: str) -> InputError:
  return InputError(f"{path}, line {line} is not valid: {problem}; expected {form}")


def _read_json_lines(path: epath.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
  form = "a JSON object on each line"
  for number, line in enumerate(_decoded(path, form).split("\n"), 1):
    if not line.strip():
      continue
    try:
      values = parse_json(line)
    except ValueError as error:
      raise _malformed(path, number, str(error), form) from error
    if not isinstance(values, dict):
      raise _malformed(path, number, "it is no object", form)
    yield number, values


def _read_csv(path: epath.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
  form = "comma-separated values with a line of column names first"
  rows = csv.DictReader(io.StringIO(_decoded(path, form), newline=""), strict=True)
  try:
    for values in rows:
      yield rows.line_num, values
  except csv.Error as error:
    raise _malformed(path, rows.line_num, str(error), form) from error


def _read_pages(path: epath.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
  """Yields the pages of raw WikiText: a heading of the first level begins one."""
  first = 1
  lines: list[str] = []
  for number, line in enumerate([*_decoded(path, FORMS["wikitext"]).split("\n"), None], 1):
    heading = "" if line is None else line.replace("= = =", "===").replace("= =", "==").strip()
    if line is None or (heading.startswith("= ") and heading.endswith(" =")):
      page = "\n".join(lines)
      if page.strip():
        yield first, {"page": page}
      first, lines = number, []
    if line is not None:
      lines.append(line)


def _label(path: epath.Path, index: int) -> str:
  """Returns an item's label from the file of labels beside PIQA's, as it was published."""
  name = path.name.removesuffix(".gz").removesuffix(".jsonl") + "-labels.lst"
  labels = path.parent / name
  if not labels.is_file():
    raise ValueError(f"no label, and no {name} beside the file")
  lines = _decoded(labels, "a label on each line").split()
  if index >= len(lines):
    raise _malformed(labels, index + 1, "it has fewer lines than the items", "0 or 1")
  return lines[index]
