"""Code spans and links in documents: what they name exists."""

import pathlib
import re
from collections.abc import Iterator

from tests.documents import commands
from tests.documents.keys import key_problem
from tests.documents.sources import PACKAGES, sources
from tests.helpers import ROOT

CODE_SUFFIXES = (".py", ".md", ".sbatch", ".npz", ".svg", ".toml")
# Elsewhere than in the tree: a run's folder, an environment, a home, a bucket.
ELSEWHERE = ("~", "gs:", ".venv", "runs/", "/", "$")
FOREIGN_OPTIONS = {"--build-arg"}  # Of docker.
_ASSIGNMENT = re.compile(r"(?:--)?[A-Za-z_][\w.]*=[\w.-]*")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+\.?|(?:config|model|data|optimizer|train|mesh)\.")
_PATH = re.compile(r"[\w.<>*~$:/-]+")
_CALL = re.compile(r"([A-Za-z_][\w.]*)\(.*\)", re.S)


def span_problem(span: str, beside: pathlib.Path) -> str | None:
  """Says what is not so in a code span of a document in the folder `beside`."""
  words = commands.words(span)
  if words and words[0] in commands.PROGRAMS:
    return commands.problem(span, named=True)
  if span.startswith("--"):
    return _first(map(_option_problem, (word for word in words if word.startswith("--"))))
  case = re.fullmatch(r"(\S+\.py) -k (\w+)", span)
  if case:
    return _path_problem(case[1], beside) or (
        None if case[2] in (ROOT / case[1]).read_text() else f"{case[1]} has no {case[2]}"
    )
  if all(_ASSIGNMENT.fullmatch(word) for word in span.split()):
    return _first(key_problem(*word.split("=", 1)) for word in span.split())
  if " " in span and not _CALL.fullmatch(span):
    return None
  call = _CALL.fullmatch(span)
  name = call[1] if call else span
  if not call and _PATH.fullmatch(name) and _is_path(name):
    return _path_problem(name, beside)
  if _DOTTED.fullmatch(name):
    return _dotted_problem(name)
  # A name that is long enough to be no letter of the mathematics, and no axes alone (_BTE).
  is_name = re.fullmatch(r"[A-Za-z_]\w{2,}", name) and not re.fullmatch(r"_[A-Z0-9]+", name)
  is_ours = call or "_" in name.strip("_") or name[:1].isupper()
  if is_name and is_ours and name not in sources().words:
    return f"`{name}` is no word of the sources"
  return None


def _first(problems: Iterator[str | None]) -> str | None:
  return next((problem for problem in problems if problem), None)


def _is_path(name: str) -> bool:
  return "/" in name or name.startswith(".") or pathlib.PurePath(name).suffix in {
      *CODE_SUFFIXES, ".json", ".jsonl", ".html", ".png", ".bin", ".safetensors", ".model", ".yaml"
  } or name in ("Makefile", "Dockerfile")


def _option_problem(word: str) -> str | None:
  option, _, value = word.partition("=")
  if option.startswith("--config."):
    key = option.removeprefix("--config.")
    return None if key in ("", "KEY") else key_problem(key, value)
  if option in FOREIGN_OPTIONS or option in sources().strings:
    return None
  return f"no parser of ours has {option}"


def _path_problem(name: str, beside: pathlib.Path) -> str | None:
  if name.startswith(ELSEWHERE) or "*" in name:
    return None
  known, placeholder, _ = name.partition("<")
  if placeholder:
    name = known.rpartition("/")[0]
  tree = sources()
  if not name or tree.has_path(name, beside):
    return None
  is_code = name.endswith(CODE_SUFFIXES) or name in ("Makefile", "Dockerfile")
  if name in tree.strings or (not is_code and tree.spells(name.strip("/"))):
    return None
  return f"there is no `{name}`" if is_code else f"`{name}` is neither in the tree nor in the code"


def _dotted_problem(name: str) -> str | None:
  tree = sources()
  first, *rest = name.split(".")
  if first in ("config", "model", "data", "optimizer", "train", "mesh", "dense", "mixer"):
    return key_problem(name)
  if first in PACKAGES:
    return None if tree.resolves(name) else f"there is no `{name}`"
  if first[0].isupper():
    if first in tree.classes and rest[0] not in tree.members(first):
      return f"{first} has no {rest[0]}"
    return None if first in tree.words else f"there is no class {first}"
  if first in tree.modules and not tree.module_has(first, rest[0]):
    return f"no module {first} has {rest[0]}"
  return None


def defined_problem(span: str, path: str, beside: pathlib.Path) -> str | None:
  """Says that a name is not defined in the file that the text says it is in."""
  name = (_CALL.fullmatch(span) or {1: span})[1]
  if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or _is_path(name):
    return None
  tree = sources()
  files = tree.find(path, beside)
  last = name.rpartition(".")[2]
  if files and not any(last in tree.defined(file) for file in files):
    return f"`{name}` is not defined in {path}"
  return None


def link_problem(target: str, document: pathlib.Path) -> str | None:
  """Says what is wrong with the target of a document's link."""
  if target.startswith(("http:", "https:")):
    return None
  path, _, anchor = target.partition("#")
  file = document.parent / path if path else document
  if not file.exists():
    return f"the link {target} leads nowhere"
  if anchor:
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    anchors = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
    if anchor not in anchors:
      return f"{file.name} has no heading #{anchor}"
  return None
