"""The project's own files: what they define, which words they use, what is where in the tree."""

import ast
import functools
import importlib
import pathlib
import re
from collections.abc import Iterator

from tests.helpers import ROOT
from tests.syntax import parse

PACKAGES = ("dense_jax", "experiments", "launch", "tests")
_OTHERS = ("Makefile", "launch/slurm.sbatch", "launch/Dockerfile")


class Sources:
  """What the project's files define and spell; they are parsed, not imported.

  Attributes:
    files: path -> syntax tree.
    words: every identifier, and the words of strings that are no docstrings; of tests only what
      they define.
    strings: all strings that are no docstrings.
    classes: class name -> its definitions.
    modules: last part of a module's name -> its files or folders.
    paths: every file and folder inside the project's folders, relative to the root.
  """

  def __init__(self, root: pathlib.Path) -> None:
    """Reads all files."""
    self.root = root
    self.files: dict[pathlib.Path, ast.Module] = {}
    self.words: set[str] = set()
    self.strings: set[str] = set()
    self.classes: dict[str, list[ast.ClassDef]] = {}
    self.modules: dict[str, list[pathlib.Path]] = {}
    for folder in PACKAGES:
      for path in sorted((root / folder).rglob("*.py")):
        self._read(path, uses=folder != "tests")
    for name in _OTHERS:
      self.words |= set(re.findall(r"\w+", (root / name).read_text(encoding="utf-8")))
    self.words |= set(self.modules)
    inside = [path for folder in (*PACKAGES, "docs", ".ci") for path in (root / folder).rglob("*")
              if "__pycache__" not in path.parts]
    self.paths = {path.relative_to(root).as_posix() for path in inside}

  def _read(self, path: pathlib.Path, uses: bool) -> None:
    tree = self.files[path] = parse(path.read_text(encoding="utf-8"))
    module = path.parent if path.name == "__init__.py" else path
    self.modules.setdefault(module.stem, []).append(module)
    self.words |= self.defined(path)
    for node in ast.walk(tree):
      if isinstance(node, ast.ClassDef):
        self.classes.setdefault(node.name, []).append(node)
    if not uses:
      return
    docstrings = {id(value) for value in _docstrings(tree)}
    for node in ast.walk(tree):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if id(node) not in docstrings:
          self.strings.add(node.value)
          self.words |= set(re.findall(r"\w+", node.value))
      else:
        self.words |= set(_identifiers(node))

  def defined(self, path: pathlib.Path) -> set[str]:
    """Returns what a file defines: functions, classes, methods, attributes, variables."""
    return _definitions(self.files[path])

  def members(self, name: str) -> set[str]:
    """Returns what the classes of a name define, and their bases."""
    found: set[str] = set()
    for node in self.classes.get(name, []):
      found |= _definitions(node)
      for base in node.bases:
        if isinstance(base, ast.Name) and base.id != name:
          found |= self.members(base.id)
    return found

  def module_path(self, module: str) -> pathlib.Path | None:
    """Returns the file or folder of a dotted module; None if there is none."""
    path = self.root / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path) if p.exists()), None)

  def module_has(self, stem: str, name: str) -> bool:
    """Whether a module of that last name defines, imports or contains a name."""
    for path in self.modules[stem]:
      if path.is_dir() and ((path / name).is_dir() or (path / f"{name}.py").is_file()):
        return True
      file = path / "__init__.py" if path.is_dir() else path
      imported = [name for node in self.files[file].body for name in _identifiers(node)]
      if name in self.defined(file) or name in imported:
        return True
    return False

  def resolves(self, name: str) -> bool:
    """Whether a dotted name that begins with a package is a module, or what one has."""
    module, rest = name, []
    while module and not self.module_path(module):
      module, _, last = module.rpartition(".")
      rest.insert(0, last)
    if not rest:
      return True
    try:
      found = importlib.import_module(module)
    except ImportError:
      return False
    for part in rest:
      found = getattr(found, part, None)
    return found is not None

  def has_path(self, name: str, beside: pathlib.Path) -> bool:
    """Whether a file or folder is there; see `find`."""
    return bool(self.find(name, beside, any_file=True))

  def find(self, name: str, beside: pathlib.Path, any_file: bool = False) -> list[pathlib.Path]:
    """Returns the files of a name, below the root, dense_jax/ or a document's folder.

    A bare name may be anywhere in the tree.

    Args:
      name: a path, as a document has it.
      beside: the document's folder.
      any_file: files that are no Python, and folders, too.
    """
    name = name.rstrip("/")
    bases = (self.root, self.root / "dense_jax", beside)
    found = [base / name for base in bases if (base / name).exists()]
    if "/" not in name:
      found += [self.root / path for path in self.paths if path.rpartition("/")[2] == name]
    return [path for path in found if any_file or path in self.files]

  def spells(self, name: str) -> bool:
    """Whether a string of the sources has that name as a word of its own."""
    return any(re.search(rf"(?:^|\W){re.escape(name)}(?:\W|$)", text) for text in self.strings)


def _docstrings(tree: ast.Module) -> Iterator[ast.expr]:
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
      first = node.body[0]
      if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        yield first.value


def _definitions(tree: ast.AST) -> set[str]:
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
      names.add(node.id if isinstance(node, ast.Name) else node.attr)
  return names


def _identifiers(node: ast.AST) -> Iterator[str]:
  if isinstance(node, ast.Name):
    yield node.id
  elif isinstance(node, ast.Attribute):
    yield node.attr
  elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
    yield node.arg
  elif isinstance(node, ast.Import | ast.ImportFrom):
    for alias in node.names:
      yield from (alias.asname or alias.name).split(".")


@functools.cache
def sources() -> Sources:
  """Returns the project's own, read once."""
  return Sources(ROOT)
