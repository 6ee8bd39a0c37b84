"""Python in documents: imports, attributes, keywords and config keys exist; nothing runs."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator

from tests.documents.keys import key_problem
from tests.documents.sources import PACKAGES, sources
from tests.syntax import parse


def problems(text: str) -> Iterator[str]:
  """Yields what is not so in a Python block: imports, attributes, keywords, config keys."""
  known: dict[str, object] = {}
  for node in ast.walk(parse(text)):
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        if sources().resolves(name):
          known[alias.asname or alias.name] = _object(name)
        else:
          yield f"there is no {name}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      is_key = re.fullmatch(r"(model|data|optimizer|train|mesh)\.[\w.]+", node.value)
      problem = key_problem(node.value) if is_key else None
      if problem:
        yield problem
  for node in ast.walk(parse(text)):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      owner = known.get(node.value.id)
      if owner is not None and not hasattr(owner, node.attr):
        yield f"{node.value.id} has no {node.attr}"
    elif isinstance(node, ast.Call):
      yield from _call_problems(node, known)


def _object(name: str) -> object:
  module, _, attribute = name.rpartition(".")
  found = getattr(importlib.import_module(module), attribute, None)
  return importlib.import_module(name) if found is None else found


def _call_problems(call: ast.Call, known: dict[str, object]) -> Iterator[str]:
  function = known.get(call.func.id) if isinstance(call.func, ast.Name) else None
  if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
    function = getattr(known.get(call.func.value.id), call.func.attr, None)
  if not callable(function):
    return
  try:
    inspect.signature(function).bind(*call.args, **{word.arg: 0 for word in call.keywords})
  except TypeError as error:
    yield f"{ast.unparse(call)}: {error}"
