"""Docstrings begin with a verb or with what the thing is, as a test.

Files are parsed, never imported.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

from tests.test_imports import PACKAGE, ROOT, read

FOLDERS = (PACKAGE, "experiments", "launch")
# Beginnings of a clause that says something about the thing, but not what it is or does.
BANNED_BEGINNING = re.compile(
    r"(What|How|Where|Who|Which|Whether|When|Of|By|As|For|None|Kept)\b"
)
# "None is one": say what the value means, or what it is instead of.
BANNED_NONE = re.compile(r"\bNone\s+is\b")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
  """Yields the line and the text of each docstring of a module, its classes and functions."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      text = ast.get_docstring(node)
      if text is not None:
        yield node.body[0].lineno, text


def riddles(root: pathlib.Path) -> Iterator[str]:
  """Yields a line for each docstring that breaks a rule."""
  for source in read(root, *FOLDERS):
    for line, text in docstrings(source.tree):
      where, first = f"{source.path}:{line}", text.partition("\n")[0]
      if BANNED_BEGINNING.match(text):
        yield f"{where}: begin with a verb, or say what the thing is: {first}"
      if BANNED_NONE.search(text):
        yield f"{where}: write 'None means ...': {first}"


def test_no_docstring_is_a_riddle():
  violations = list(riddles(ROOT))
  assert not violations, "\n".join(["", *violations])
  assert all(any(docstrings(s.tree)) for s in read(ROOT, *FOLDERS) if s.text)  # All are seen.


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("dense_jax/a.py", '"""What it gives."""', "a.py:1: begin with a verb"),
        ("dense_jax/ops/a.py", 'class A:\n  """\n  Which of them."""', "ops/a.py:2: begin with"),
        ("experiments/a.py", 'def f():\n  """As `g`, twice."""', "experiments/a.py:2: begin"),
        ("launch/a.py", 'async def f():\n  r"""None where it ends."""', "launch/a.py:2: begin"),
        ("dense_jax/a.py", 'class A:\n  def f():\n    """By hand."""', "a.py:3: begin with"),
        ("dense_jax/a.py", '"""Adds.\n\nArgs:\n  n: a gate; None\n    is one."""', "'None means"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, text, message):
  _write(tmp_path, path, text)
  (violation,) = riddles(tmp_path)
  assert message in violation


@pytest.mark.parametrize("text", [
    '"""Returns what it has when None means 1."""', '"""Bytes of a whole."""', "", "# What\nx = 1",
    '"""Forms."""\n"""None is what is no docstring."""', 'def f():\n  return "As"',
])
def test_what_is_allowed_passes(tmp_path, text):
  _write(tmp_path, "dense_jax/a.py", text)
  assert not list(riddles(tmp_path))


def _write(root: pathlib.Path, path: str, text: str) -> None:
  (root / path).parent.mkdir(parents=True)
  (root / path).write_text(text, encoding="utf-8")
