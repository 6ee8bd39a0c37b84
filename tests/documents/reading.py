"""Documents as text and code blocks, and how those of the project are checked."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

from tests.documents import commands, python_blocks, spans

_SPANS_OF_FILE = re.compile(
    r"((?:`[^`\n]+`(?:,\s|\sand\s|\sor\s))*`[^`]+`)\s(?:of|in|\()\s?(?:its\s)?`([^`\s]+\.py)`"
)


@dataclasses.dataclass(frozen=True)
class Document:
  """A document: its path, its text without code blocks, and its code blocks.

  Attributes:
    path: the file.
    prose: the text; lines of code blocks are empty, so that line numbers stay.
    blocks: (first line, language or "", lines) of each code block, fenced or indented.
  """

  path: pathlib.Path
  prose: str
  blocks: list[tuple[int, str, list[str]]]


def read(path: pathlib.Path, text: str | None = None) -> Document:
  """Reads a document; `text` instead of what the file has, if it is given."""
  lines = (path.read_text(encoding="utf-8") if text is None else text).splitlines()
  prose: list[str] = []
  blocks: list[tuple[int, str, list[str]]] = []
  fenced = indented = False
  for number, line in enumerate(lines, 1):
    fence = re.match(r"```(\w*)", line)
    if fence:
      fenced = not fenced
      if fenced:
        blocks.append((number + 1, fence[1], []))
    elif fenced:
      blocks[-1][2].append(line)
    elif line.startswith("    ") and (indented or number == 1 or not lines[number - 2].strip()):
      if not indented:
        blocks.append((number, "", []))
      blocks[-1][2].append(line[4:])
      indented = True
      prose.append("")
      continue
    else:
      indented = indented and not line
      prose.append(line)
      continue
    indented = False
    prose.append("")
  return Document(path, "\n".join(prose), blocks)


def false_statements(document: Document) -> Iterator[str]:
  """Yields PATH:LINE: what is false, for everything of ours that a document names."""
  beside = document.path.parent

  def at(line: int, problem: str | None) -> Iterator[str]:
    if problem:
      yield f"{document.path.name}:{line}: {problem}"

  for first, language, lines in document.blocks:
    if language == "python":
      for problem in python_blocks.problems("\n".join(lines)):
        yield from at(first, problem)
      continue
    for line, problem in commands.problems(lines):
      yield from at(first + line, problem)
  for match in re.finditer(r"(`+)(.+?)\1", document.prose, re.S):
    if "\n\n" not in match[2]:
      line = document.prose.count("\n", 0, match.start()) + 1
      yield from at(line, spans.span_problem(" ".join(match[2].split()), beside))
  for match in _SPANS_OF_FILE.finditer(document.prose):
    line = document.prose.count("\n", 0, match.start()) + 1
    for span in re.findall(r"`([^`]+)`", match[1]):
      yield from at(line, spans.defined_problem(span, match[2], beside))
  for match in re.finditer(r"\]\(([^)\s]+)\)", document.prose):
    line = document.prose.count("\n", 0, match.start()) + 1
    yield from at(line, spans.link_problem(match[1], document.path))


