"""The architecture, as a test: what each room of dense_jax may import.

Files are parsed, never imported. A new room is one row of `ROOMS`.
"""

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import pytest

from tests.syntax import parse

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "dense_jax"

_MODEL = ("models", "layers", "ops", "types", "errors", "batch", "config", "files", "interrupt",
          "sharding", "distributed")
# Room -> the other rooms that it may import. `__init__` is dense_jax/__init__.py itself.
ROOMS = {
    "__init__": (),
    "errors": (),
    "batch": ("types",),
    "types": ("batch",),
    "config": ("errors",),
    "files": ("errors",),
    "statistics": (),
    "formatting": ("types",),
    "outputs": ("errors", "config", "files"),
    "distributed": ("errors", "types"),
    "interrupt": (),
    "sharding": ("errors", "batch", "types", "config"),
    "ops": ("errors", "batch", "types"),
    "layers": ("ops", "errors", "batch", "types", "config", "sharding"),
    "models": ("layers", "ops", "errors", "batch", "types", "config", "sharding"),
    "data": ("errors", "batch", "config", "files"),
    "training": _MODEL,
    "evaluation": (*_MODEL, "data"),
    "generation": (*_MODEL, "data"),
    "interop": (*_MODEL, "outputs"),
    "costs": ("errors",),
    "experiment": ("models", "errors", "config", "files"),
    "runs": (*_MODEL, "data", "training", "evaluation", "generation", "interop", "costs",
             "experiment", "outputs", "formatting"),
    "analysis": ("models", "layers", "ops", "batch", "errors", "files", "types", "formatting",
                 "statistics"),
    "sweeps": (*_MODEL, "data", "training", "experiment", "outputs", "runs", "formatting",
               "statistics"),
    "cli": (*_MODEL, "data", "generation", "interop", "costs", "experiment", "outputs", "runs",
            "analysis", "sweeps", "formatting"),
}

# Room -> libraries that it does without.
BANNED = {
    "types": {"flax"},
    "errors": {"jax", "flax"},
    "batch": {"jax", "flax"},
    "interrupt": {"jax", "flax"},
    "config": {"jax", "flax"},
    "ops": {"flax"},
    "data": {"jax", "flax", "optax", "orbax"},
}

# Library -> where it may be imported; ConfigDicts end at this edge.
ONLY_IN = {"ml_collections": ("dense_jax/experiment.py", "dense_jax/cli/", "experiments/")}

# Imported inside the functions that need them, so that the rest runs without them.
OPTIONAL = {"lm_eval", "torch", "safetensors", "zstandard", "matplotlib", "tensorboardX",
            "tokenizers", "apache_beam", "pyarrow", "wandb"}

# What tells one platform from another, and the only places that ask.
PLATFORM_NAMES = {"default_backend", "platform"}
PLATFORM_FILES = ("dense_jax/ops/resolver.py", "dense_jax/sharding.py")

MAX_LINES = 400


@dataclasses.dataclass(frozen=True)
class Source:
  """A parsed file: its path below the root, with slashes, its text and its syntax tree."""

  path: str
  text: str
  tree: ast.Module

  @property
  def room(self) -> str:
    """The room of a file of the package; empty for any other file."""
    parts = self.path.removesuffix(".py").split("/")
    return parts[1] if parts[0] == PACKAGE else ""


@dataclasses.dataclass(frozen=True)
class Import:
  """One imported name, as an absolute dotted path."""

  line: int
  name: str
  deferred: bool

  @property
  def library(self) -> str:
    return self.name.partition(".")[0]


@functools.cache
def read(root: pathlib.Path, *folders: str) -> list[Source]:
  sources = []
  for folder in folders:
    for path in sorted((root / folder).rglob("*.py")):
      text = path.read_text(encoding="utf-8")
      sources.append(Source(path.relative_to(root).as_posix(), text, parse(text)))
  return sources


def imports(source: Source) -> Iterator[Import]:
  """Every import, those inside functions and under TYPE_CHECKING too."""

  def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.Import):
        for alias in child.names:
          yield Import(child.lineno, alias.name, deferred)
      elif isinstance(child, ast.ImportFrom):
        # `from . import x` in a/b.py is a.x; the file's own name is level one.
        base = source.path.removesuffix(".py").split("/")[: -child.level] if child.level else []
        module = ".".join([*base, *([child.module] if child.module else [])])
        for alias in child.names:
          yield Import(child.lineno, f"{module}.{alias.name}", deferred)
      else:
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from walk(child, deferred or function or typing_only)

  return walk(source.tree, False)


def backward_arrows(root: pathlib.Path) -> Iterator[str]:
  for source in read(root, PACKAGE):
    if source.room not in ROOMS:
      yield f"{source.path}:1: room {source.room} has no row in ROOMS"
      continue
    allowed = ROOMS[source.room]
    for imported in imports(source):
      parts = imported.name.split(".")
      # `from dense_jax import __version__` names no room.
      if parts[0] != PACKAGE or len(parts) == 1 or parts[1] not in ROOMS:
        continue
      if parts[1] != source.room and parts[1] not in allowed:
        yield (
            f"{source.path}:{imported.line}: {source.room} -> {parts[1]} ({imported.name}); "
            f"{source.room} may import: {', '.join(allowed) or 'no other room'}"
        )


def misplaced_libraries(root: pathlib.Path) -> Iterator[str]:
  for source in read(root, PACKAGE, "experiments", "launch"):
    for imported in imports(source):
      library, where = imported.library, f"{source.path}:{imported.line}"
      if library in BANNED.get(source.room, ()):
        yield f"{where}: {source.room} -> {library}; {source.room} does without {library}"
      if library in ONLY_IN and not source.path.startswith(ONLY_IN[library]):
        yield f"{where}: -> {library}, only for {', '.join(ONLY_IN[library])}"
      if library in OPTIONAL and not imported.deferred and source.room:
        yield f"{where}: -> {library} at the top; import it in the function that needs it"


def platform_lookups(root: pathlib.Path) -> Iterator[str]:
  for source in read(root, PACKAGE):
    if source.path.startswith(PLATFORM_FILES):
      continue
    for node in ast.walk(source.tree):
      if isinstance(node, ast.Attribute) and node.attr in PLATFORM_NAMES:
        found = ast.unparse(node)
        if found != "sys.platform":
          yield f"{source.path}:{node.lineno}: {found}; only {', '.join(PLATFORM_FILES)} may ask"
    for imported in imports(source):
      if imported.library == "jax" and imported.name.rpartition(".")[2] in PLATFORM_NAMES:
        yield f"{source.path}:{imported.line}: {imported.name}"


def long_files(root: pathlib.Path) -> Iterator[str]:
  for source in read(root, PACKAGE, "experiments", "launch", "tests"):
    lines = len(source.text.splitlines())
    if lines > MAX_LINES:
      yield f"{source.path}:{MAX_LINES + 1}: {lines} lines; a file past {MAX_LINES} is two files"


RULES: list[Callable[[pathlib.Path], Iterator[str]]] = [
    backward_arrows, misplaced_libraries, platform_lookups, long_files,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule):
  violations = list(rule(ROOT))
  assert not violations, "\n".join(["", *violations])


def test_the_rooms_are_there():
  """A path that moved must not turn the rules above into rules about nothing."""
  assert {source.room for source in read(ROOT, PACKAGE)} >= {"types", "config", "ops", "layers"}
  assert {room for allowed in ROOMS.values() for room in allowed} <= set(ROOMS)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("dense_jax/ops/a.py", "import dense_jax.layers.norms", "ops/a.py:1: ops -> layers"),
        ("dense_jax/ops/a.py", "\nfrom dense_jax import models", "ops/a.py:2: ops -> models"),
        ("dense_jax/ops/pallas/a.py", "from ... import layers", "ops/pallas/a.py:1: ops -> layers"),
        ("dense_jax/ops/__init__.py", "from ..config import X", "__init__.py:1: ops -> config"),
        ("dense_jax/layers/a.py", "def f():\n  from ..models import lm", "a.py:2: layers -> mo"),
        ("dense_jax/types.py", "from dense_jax import config", "types.py:1: types -> config"),
        ("dense_jax/config/a.py", "import dense_jax.sharding", "a.py:1: config -> sharding"),
        ("dense_jax/data/a.py", "from dense_jax.models import lm", "a.py:1: data -> models"),
        ("dense_jax/training/a.py", "import dense_jax.data", "a.py:1: training -> data"),
        ("dense_jax/evaluation/a.py", "import dense_jax.training", "evaluation -> training"),
        ("dense_jax/experiment.py", "import dense_jax.cli.train", "experiment -> cli"),
        ("dense_jax/runs/a.py", "import dense_jax.cli.train", "runs -> cli"),
        ("dense_jax/evaluation/a.py", "import dense_jax.runs", "evaluation -> runs"),
        ("dense_jax/__init__.py", "from .models import lm", "__init__ -> models"),
        ("dense_jax/attic/a.py", "", "attic/a.py:1: room attic has no row in ROOMS"),
        ("dense_jax/ops/a.py", "from flax import nnx", "a.py:1: ops -> flax"),
        ("dense_jax/data/a.py", "import jax.numpy as jnp", "a.py:1: data -> jax"),
        ("dense_jax/models/a.py", "import ml_collections", "a.py:1: -> ml_collections"),
        ("dense_jax/interop/a.py", "try:\n  import torch\nexcept ImportError: pass",
         "a.py:2: -> torch at the top"),
        ("dense_jax/layers/a.py", "import jax\njax.default_backend()", "a.py:2: jax.default_b"),
        ("dense_jax/layers/a.py", "from jax import default_backend", "a.py:1: jax.default_backend"),
        ("dense_jax/layers/a.py", "import jax\njax.devices()[0].platform", "a.py:2: jax.devices()"),
        ("tests/a.py", "\n" * 401, "a.py:401: 401 lines"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, text, message):
  _write(tmp_path, path, text)
  (violation,) = [found for rule in RULES for found in rule(tmp_path)]
  assert message in violation


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("dense_jax/ops/a.py", "from dense_jax.types import Array\nfrom . import states"),
        ("dense_jax/layers/a.py", "import dense_jax\nfrom dense_jax import __version__"),
        ("dense_jax/interop/a.py", "def f():\n  import torch"),
        ("dense_jax/interop/a.py",
         "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import torch"),
        ("dense_jax/ops/resolver.py", "import jax\njax.default_backend()"),
        ("dense_jax/data/a.py", "import platform, sys\nplatform.system(), sys.platform"),
        ("dense_jax/cli/train.py", "import dense_jax.data, ml_collections\nfrom . import common"),
        ("experiments/smoke.py", "import ml_collections\nimport matplotlib.pyplot"),
        ("tests/a.py", "\n" * 400),
    ],
)
def test_what_is_allowed_passes(tmp_path, path, text):
  _write(tmp_path, path, text)
  assert not [found for rule in RULES for found in rule(tmp_path)]


def _write(root: pathlib.Path, path: str, text: str) -> None:
  (root / path).parent.mkdir(parents=True)
  (root / path).write_text(text, encoding="utf-8")
