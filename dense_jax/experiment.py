"""Experiment files: from `ml_collections.ConfigDict` to the frozen config dataclasses.

An experiment is a Python file with `get_config(arg="") -> ConfigDict`, which starts from
`default_config`. A command line names it as FILE.py or FILE.py:ARG and changes it by
`--config.KEY=VALUE`. The modules below this one only see `ExperimentConfig`.
"""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dense_jax.config import (
  ExperimentConfig,
  build,
  defaults,
  field_types,
  invalid,
  unknown_key,
)
from dense_jax.errors import InputError, raised_by
from dense_jax.files import make_path, parse_json, write_atomically
from dense_jax.models.registry import family

CONFIG_FILE = "config.json"
_MIXER = "config.model.mixer"
# What the names of experiments' modules begin with.
_MODULE = "experiment_"


def default_config(family_name: str = "mamba") -> ConfigDict:
  """Returns the defaults as a ConfigDict, for experiments to edit.

  `model.mixer` holds the options of the named family.
  """
  values = defaults(ExperimentConfig)
  values["model"]["family"] = family_name
  values["model"]["mixer"] = defaults(family(family_name).config)
  return ConfigDict(values)


def resolve(values: Mapping[str, Any]) -> ExperimentConfig:
  """Converts a nested dict or ConfigDict to a validated `ExperimentConfig`.

  Raises:
    InputError: a key or value is not valid; the error names key, value and what would be valid.
  """
  plain = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
  name = plain.get("model", {}).get("family", ExperimentConfig().model.family)
  plain.setdefault("model", {})
  if plain["model"].get("mixer") is None:
    plain["model"]["mixer"] = {}
  return build(ExperimentConfig, plain, variants={_MIXER: family(name).config})


def _parse(key: str, text: str, annotation: Any) -> Any:
  """Converts a value from the command line to its field's type."""
  try:
    if annotation is bool:
      return {"true": True, "false": False}[text.lower()]
    if annotation in (int, float):
      return annotation(text)
  except (KeyError, ValueError):
    wanted = "true or false" if annotation is bool else f"a value of type {annotation.__name__}"
    raise invalid(key, text, wanted) from None
  return text


def _override(values: dict[str, Any], key: str, text: str) -> None:
  """Sets the dotted `key` (after "config.") in nested values."""
  group: Any = ExperimentConfig
  node, path = values, "config"
  *parents, name = key.split(".")
  for part in parents:
    types = field_types(group)
    nested = family(values["model"]["family"]).config if part == "mixer" else types.get(part)
    if part not in types or not dataclasses.is_dataclass(nested):
      groups = [field for field, kind in types.items() if dataclasses.is_dataclass(kind)]
      raise unknown_key(f"{path}.{part}", groups or list(types))
    group, path = nested, f"{path}.{part}"
    if not isinstance(node.get(part), dict):
      raise invalid(path, node.get(part), "the group of keys that default_config has")
    node = node[part]
  types = field_types(group)
  if name not in types:
    raise unknown_key(f"{path}.{name}", list(types))
  if dataclasses.is_dataclass(types[name]) or name == "mixer":
    raise invalid(f"{path}.{name}", text, "a key inside it: it is a group of keys")
  node[name] = _parse(f"{path}.{name}", text, types[name])


def get_config(file: pathlib.Path, argument: str = "") -> ConfigDict:
  """Returns the result of the file's `get_config`.

  Experiments call this too, to start from another experiment.
  """
  module_spec = importlib.util.spec_from_file_location(f"{_MODULE}{file.stem}", file)
  if module_spec is None or module_spec.loader is None:
    raise InputError(f"--config = {str(file)!r} is not valid: expected a Python file")
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  return module.get_config(argument)


def load(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> ExperimentConfig:
  """Loads an experiment and applies overrides.

  An override of `model.family` replaces `model.mixer` by the defaults of that family.

  Args:
    spec: FILE.py or FILE.py:ARG. A leading ~ is expanded.
    overrides: pairs of a dotted key without "config." and its value as text.

  Raises:
    InputError: the file, a key or a value is not valid. Of an exception that the file raises, it
      gives the line.
  """
  name, _, argument = spec.partition(":")
  file = pathlib.Path(make_path(name, "--config"))
  if not file.is_file():
    raise invalid("--config", spec, "an experiment file, FILE.py[:ARG]")
  try:
    config = get_config(file, argument)
  except InputError:
    raise
  except Exception as error:
    raise raised_by(error, file, _MODULE) from error
  if not isinstance(config, ConfigDict) or not isinstance(config.get("model"), ConfigDict):
    raise InputError(f"{file}: get_config returned {type(config).__name__}, expected a ConfigDict "
                     "with the groups that default_config has")
  return _changed(config.to_dict(), overrides)


def change(config: ExperimentConfig, overrides: Sequence[tuple[str, str]]) -> ExperimentConfig:
  """Returns a configuration with overrides applied, as `load` does.

  Raises:
    InputError: a key or a value is not valid.
  """
  return _changed(defaults(config), overrides)


def _changed(values: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> ExperimentConfig:
  for key, text in overrides:
    if key == "model.family" and text != values["model"]["family"]:
      values["model"].update(family=text, mixer=defaults(family(text).config))
  for key, text in overrides:
    _override(values, key, text)
  return resolve(values)


def check_argument(argument: str, *known: str) -> str:
  """Checks the argument of a `get_config`, and returns it.

  Raises:
    InputError: it is neither empty nor one of `known`.
  """
  if argument and argument not in known:
    raise InputError(f"--config argument {argument!r} is not valid: expected {', '.join(known)}")
  return argument


def save(config: ExperimentConfig, workdir: epath.Path) -> None:
  """Writes the resolved configuration into the run's folder, atomically."""
  text = json.dumps(defaults(config), indent=2) + "\n"
  write_atomically(workdir / CONFIG_FILE, text.encode())


def read(workdir: epath.Path) -> ExperimentConfig:
  """Reads the resolved configuration of a run.

  Raises:
    InputError: the folder holds no run, or the file is damaged.
  """
  file = workdir / CONFIG_FILE
  if not file.is_file():
    raise invalid("--workdir", str(workdir), f"a run with {CONFIG_FILE}")
  try:
    content = file.read_bytes()
    values = parse_json(content)
    if b"\\u0000" in content:
      raise ValueError("it has a null character, which no path can hold")
    if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
      raise ValueError("it is no object of groups of keys")
    return resolve(values)
  except (OSError, TypeError, ValueError) as error:  # An InputError is a ValueError.
    raise InputError(f"{file} cannot be read as a run's configuration: {error}") from error
