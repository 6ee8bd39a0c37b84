"""Explains every key of an experiment: `--help-config`, and docs/configuration.md.

Both are made from the fields of the config dataclasses, which hold the default, the valid values
and the meaning of each key. `python -m dense_jax.cli.config_help > docs/configuration.md` writes
the document.
"""

import argparse
import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from dense_jax import experiment
from dense_jax.cli import common
from dense_jax.config import LARGEST, ExperimentConfig
from dense_jax.models.registry import FAMILIES
from dense_jax.runs import resume

_OPTION = "--help-config"
_WIDEST = 100
# Valid values of keys whose field only refers to a registry.
_VALID = {"config.model.family": "one of " + ", ".join(FAMILIES)}
_HEAD = f"""\
# Configuration

Every key of an experiment: its default, what is valid and what it means. An experiment file sets
keys in its `get_config`, and a command line sets them by `--config.KEY=VALUE`, for example
`--config.model.dense.depth=2`. The same of one experiment, with its own values, is printed by

    dense-jax train --config experiments/smoke.py {_OPTION}

The last column says whether a key may change when a run goes on: never, freely, or when asked by
name with `{resume.FLAG}`. Paths may change freely, because the data that they lead to are compared.

Integers are at most {LARGEST}, which int32 holds, unless a smaller bound is given. Letters are
those of `dense_jax/types.py`. This file is the output of `python -m dense_jax.cli.config_help`.
"""


@dataclasses.dataclass(frozen=True)
class Key:
  """A key of a configuration, as text.

  Attributes:
    name: the last part of its path, such as "depth".
    value: its value in the configuration.
    valid: the valid values, in words.
    meaning: its meaning in one line.
    change: the condition under which it may change on resume: never, freely, or when asked.
  """

  name: str
  value: str
  valid: str
  meaning: str
  change: str


@dataclasses.dataclass(frozen=True)
class Group:
  """The keys under one path, such as "config.model.dense", and their meaning in one line."""

  path: str
  meaning: str
  keys: list[Key]


def groups(
    config: Any, path: str = "config", meaning: str = "what belongs to no group below"
) -> Iterator[Group]:
  """Yields a config dataclass's own keys, then those of each group in it."""
  fields = dataclasses.fields(config)
  nested = [f for f in fields if dataclasses.is_dataclass(getattr(config, f.name))]
  keys = [
      _key(f"{path}.{field.name}", field, getattr(config, field.name))
      for field in fields if field not in nested
  ]
  yield Group(path, meaning, keys)
  for field in nested:
    inner = getattr(config, field.name)
    yield from groups(inner, f"{path}.{field.name}", field.metadata["help"])


def _key(path: str, field: dataclasses.Field[Any], value: Any) -> Key:
  valid = _VALID.get(path, field.metadata["valid"]).removesuffix(f" and <= {LARGEST}")
  change = resume.classify(path).value
  return Key(field.name, _as_typed(value), valid, field.metadata["help"], change)


def _as_typed(value: Any) -> str:
  """Returns a value as a command line takes it; empty text in quotes."""
  if isinstance(value, bool):
    return str(value).lower()
  return str(value) or "''"


def listing(config: ExperimentConfig, width: int = _WIDEST) -> str:
  """Lists every key of an experiment: its value, meaning, valid range and change on resume.

  Args:
    config: the experiment.
    width: columns of text; values are on the left, wrapped explanations on the right.
  """
  all_groups = list(groups(config))
  left = max(len(f"  {key.name} = ") for group in all_groups for key in group.keys)
  left = min(left + 10, width // 2)  # The longest values take a line of their own.
  lines = []
  for group in all_groups:
    lines += ["", *textwrap.wrap(f"{group.path}: {group.meaning}", width)]
    for key in group.keys:
      head = f"  {key.name} = {key.value}"
      about = f"{key.meaning} [{key.valid}; resume: {key.change}]"
      text = textwrap.wrap(about, max(width - left, 20))
      if len(head) > left - 2:
        lines.append(head)
      else:
        lines.append(head.ljust(left) + text.pop(0))
      lines += [" " * left + line for line in text]
  return "\n".join(lines[1:])


def document() -> str:
  """Returns the text of docs/configuration.md: all keys with their defaults, for every family."""
  parts = [_HEAD]
  mixer = "config.model.mixer"
  for group in groups(experiment.resolve({})):
    if group.path != mixer:
      parts.append(_section(group))
      continue
    for name in FAMILIES:
      options = FAMILIES[name].config()
      (own,) = groups(options, mixer, f"the options of `model.family={name}`")
      parts.append(_section(own, f" of {name}"))
  return "\n".join(parts)


def _section(group: Group, of: str = "") -> str:
  rows = [
      f"| `{key.name}` | `{key.value}` | {key.valid} | {key.meaning} | {key.change} |".replace(
          "<", "&lt;")
      for key in group.keys
  ]
  meaning = group.meaning[0].upper() + group.meaning[1:]
  return "\n".join([
      f"## {group.path}{of}", "", f"{meaning}.", "",
      "| key | default | valid | meaning | on resume |", "|---|---|---|---|---|", *rows, "",
  ])


def add_argument(command: argparse.ArgumentParser) -> None:
  """Adds --help-config, which `show` serves, to a command that has --config."""
  command.add_argument(
      _OPTION, action="store_true", help="explain every key of the experiment (--config, with "
      "any --config.KEY=VALUE), and end; no other argument is needed",
  )


def is_asked(arguments: Sequence[str]) -> bool:
  """Returns whether the arguments ask for the listing."""
  return _OPTION in arguments


def show(command: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
  """Prints the listing of the experiment that a command's arguments name; returns status 0.

  Raises:
    InputError: the experiment, a key or a value is not valid.
  """
  plain, overrides = common.take_overrides(arguments)
  parser = argparse.ArgumentParser(prog=f"{command.prog} {_OPTION}", allow_abbrev=False)
  parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
  options, _ = parser.parse_known_args(plain)
  config = experiment.load(options.config, overrides)
  print(listing(config, min(shutil.get_terminal_size((_WIDEST, 0)).columns, _WIDEST)))
  return 0


if __name__ == "__main__":
  print(document(), end="")
