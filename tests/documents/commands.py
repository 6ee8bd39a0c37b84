"""Commands in documents: each is given to its own parser, and nothing runs."""

import argparse
import contextlib
import importlib
import io
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

from dense_jax import experiment
from dense_jax.cli import common
from dense_jax.cli import main as console
from dense_jax.errors import InputError
from tests.documents.sources import PACKAGES, sources
from tests.helpers import ROOT

SMOKE = str(ROOT / "experiments" / "smoke.py")  # Stands in where a command says FILE.


class ParsedError(Exception):
  """A command has parsed its arguments, and would begin; it has them."""


def problems(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
  """Yields (line, what is wrong) of a code block's commands; lines count from 0.

  Where the block shows an error below a command, the command must be refused in these words.
  """
  for first, last, command in _commands(lines):
    found = problem(command)
    shown = lines[last + 1].removeprefix("error: ") if last + 1 < len(lines) and (
        lines[last + 1].startswith("error: ")) else None
    if shown is None:
      if found:
        yield first, found
    elif found != f"{command}: {shown}":
      yield first, f"{command}: it does not end with the error {shown!r}, but: {found}"


def _commands(lines: Sequence[str]) -> Iterator[tuple[int, int, str]]:
  """Yields the shell commands of a code block, joined, with their first and last line."""
  command, first = "", 0
  for number, line in enumerate(lines):
    first = first if command else number
    command += line.removesuffix("\\")
    if line.endswith("\\"):
      continue
    command = command.strip().removeprefix("$ ")
    if words(command)[:1] and words(command)[0] in PROGRAMS:
      yield first, number, command
    command = ""


def words(command: str) -> list[str]:
  """Returns a command's words, without its redirections and what it sets in its environment."""
  try:
    split = shlex.split(command, comments=True)
  except ValueError:  # No command: an apostrophe in text.
    return []
  split = list(itertools.takewhile(lambda word: word not in (">", "|", "&&"), split))
  return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), split))


def problem(command: str, named: bool = False) -> str | None:
  """Says what is wrong with a command; None if nothing is, or if it has placeholders.

  Args:
    command: a line of a shell.
    named: it stands in text, where `dense-jax compile` or `python -m dense_jax.cli.compile` names
      a command without its arguments.
  """
  program, *arguments = words(command)
  if re.search(r"<\w+>|\bCOMMAND\b|\.\.\.$", command):
    return None
  if named and program == "dense-jax" and arguments in [[name] for name in console.COMMANDS]:
    return None
  if named and program == "python" and arguments[:1] == ["-m"] and not arguments[2:]:
    return None if sources().module_path(arguments[1]) else f"there is no module {arguments[1]}"
  try:
    found = PROGRAMS[program](arguments)
  except InputError as error:
    found = str(error)
  return f"{command}: {found}" if found else None


def _python(arguments: list[str]) -> str | None:
  if arguments[:1] == ["-m"]:
    module, *arguments = arguments[1:]
  else:
    path, *arguments = arguments
    module = path.removesuffix(".py").replace("/", ".")
  if module == "pytest":
    return _pytest(arguments)
  if module.partition(".")[0] not in PACKAGES:
    return None
  if not sources().module_path(module):
    return f"there is no module {module}"
  main = getattr(importlib.import_module(module), "main", None)
  if main is None:
    return f"{module} takes no arguments" if arguments else None
  return _parse(main, arguments)


def _parse(main: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> str | None:
  """Calls `main` as far as its parser, and loads the experiment that the arguments name."""
  original = argparse.ArgumentParser.parse_args
  arguments = [SMOKE if word.startswith("FILE") and before == "--config" else word
               for before, word in zip(["", *arguments], arguments, strict=False)]

  def parse_args(self, arguments=None, namespace=None):
    raise ParsedError(original(self, arguments, namespace))

  said = io.StringIO()
  with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args), \
       contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), \
       contextlib.chdir(ROOT):
    try:
      main(arguments)
    except SystemExit as ended:
      return said.getvalue().strip().splitlines()[-1] if ended.code else None
    except ParsedError as parsed:
      options = parsed.args[0]
      if isinstance(getattr(options, "command", None), list):  # Of launch/local.py.
        return problem(shlex.join(options.command))
      _load(getattr(options, "config", None), common.take_overrides(arguments)[1])
  return None


def _load(spec: str | None, overrides: list[tuple[str, str]]) -> None:
  """Loads the experiment of a command that has one, or that changes one which it does not name."""
  if spec is not None or overrides:
    experiment.load(spec or SMOKE, [(key, value) for key, value in overrides if key != "KEY"])


def _console(arguments: list[str]) -> str | None:
  name, *rest = arguments or ["help"]
  if name in console.COMMANDS:
    return _python(["-m", f"dense_jax.cli.{name}", *rest])
  return _parse(console.main, arguments)


def _make(arguments: list[str]) -> str | None:
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  targets = [word for word in arguments if "=" not in word]
  for target in targets:
    if not re.search(rf"^{re.escape(target)}:", makefile, re.M):
      return f"the Makefile has no target {target}"
  for name, _, value in (word.partition("=") for word in arguments if "=" in word):
    if not re.search(rf"^{name} \??=", makefile, re.M):
      return f"the Makefile has no variable {name}"
    if name == "ARGS" and "train" in targets:
      _load(SMOKE, common.take_overrides(shlex.split(value))[1])
    elif name == "ARGS":
      return _pytest(shlex.split(value))
  return None


def _pytest(arguments: list[str]) -> str | None:
  for word in arguments:
    path = word.partition("::")[0]
    if ("/" in path or path.endswith(".py")) and not (ROOT / path).exists():
      return f"there is no {path}"
  return None


def _pip(arguments: list[str]) -> str | None:
  known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
    if not set(extra.split(",")) <= set(known):
      return f"pyproject.toml has no extra {extra}"
  return None


def _sbatch(arguments: list[str]) -> str | None:
  script = next(index for index, word in enumerate(arguments) if not word.startswith("--"))
  if not (ROOT / arguments[script]).is_file():
    return f"there is no {arguments[script]}"
  return _parse(importlib.import_module("dense_jax.cli.train").main, arguments[script + 1:])


PROGRAMS = {
    "python": _python, "dense-jax": _console, "make": _make, "pytest": _pytest, "pip": _pip,
    "sbatch": _sbatch,
}


