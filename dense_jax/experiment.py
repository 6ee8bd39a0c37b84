"""Experiment files: where `ml_collections.ConfigDict` meets the frozen dataclasses.

An experiment is a Python file with `get_config(arg="") -> ConfigDict`, begun from
`default_config`. It is named on the command line as FILE.py or FILE.py:ARG and changed by
`--config.KEY=VALUE`; below this module only `ExperimentConfig` is seen.
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
from dense_jax.errors import InputError
from dense_jax.files import parse_json, write_atomically
from dense_jax.models.registry import family

CONFIG_FILE = "config.json"
# Keys that change how a run computes, or where it caches, but not what it is. Where text and
# tokenizer lie may change: what they hold is compared.
_FREE = ("config.model.implementation", "config.model.chunk", "config.model.remat",
         "config.model.block_layers",
         "config.data.cache_dir", "config.data.path", "config.data.heldout_path",
         "config.data.tokenizer")
_MIXER = "config.model.mixer"


def default_config(family_name: str = "mamba") -> ConfigDict:
  """The defaults, with that family's own options in `model.mixer`; for experiments to edit."""
  values = defaults(ExperimentConfig)
  values["model"]["family"] = family_name
  values["model"]["mixer"] = defaults(family(family_name).config)
  return ConfigDict(values)


def resolve(values: Mapping[str, Any]) -> ExperimentConfig:
  """A nested dict or ConfigDict as a validated `ExperimentConfig`.

  Raises:
    InputError: naming the key, the value and what would be valid.
  """
  plain = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
  name = plain.get("model", {}).get("family", ExperimentConfig().model.family)
  plain.setdefault("model", {})
  if plain["model"].get("mixer") is None:
    plain["model"]["mixer"] = {}
  return build(ExperimentConfig, plain, variants={_MIXER: family(name).config})


def _parse(key: str, text: str, annotation: Any) -> Any:
  """A command-line value as its field's type."""
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
    group, node, path = nested, node[part], f"{path}.{part}"
  types = field_types(group)
  if name not in types:
    raise unknown_key(f"{path}.{name}", list(types))
  if dataclasses.is_dataclass(types[name]) or name == "mixer":
    raise invalid(f"{path}.{name}", text, "a key inside it: it is a group of keys")
  node[name] = _parse(f"{path}.{name}", text, types[name])


def get_config(file: pathlib.Path, argument: str = "") -> ConfigDict:
  """What the file's `get_config` returns; one experiment may begin with another's."""
  module_spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
  if module_spec is None or module_spec.loader is None:
    raise InputError(f"--config = {str(file)!r} is not valid: expected a Python file")
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  return module.get_config(argument)


def load(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> ExperimentConfig:
  """Loads FILE.py[:ARG] and applies overrides (dotted key without "config.", text).

  Another `model.family` brings its own defaults in `model.mixer`.

  Raises:
    InputError: the file, a key or a value is not valid.
  """
  name, _, argument = spec.partition(":")
  file = pathlib.Path(name)
  if not file.is_file():
    raise invalid("--config", spec, "an experiment file, FILE.py[:ARG]")
  try:
    config = get_config(file, argument)
  except (AttributeError, KeyError, TypeError, SyntaxError) as error:
    raise InputError(f"{file}: {error}") from error
  values = config.to_dict()
  for key, text in overrides:
    if key == "model.family" and text != values["model"]["family"]:
      values["model"].update(family=text, mixer=defaults(family(text).config))
  for key, text in overrides:
    _override(values, key, text)
  return resolve(values)


def check_argument(argument: str, *known: str) -> str:
  """For `get_config`: the argument, which must be empty or one of `known`."""
  if argument and argument not in known:
    raise InputError(f"--config argument {argument!r} is not valid: expected {', '.join(known)}")
  return argument


def save(config: ExperimentConfig, workdir: epath.Path) -> None:
  """Writes the resolved configuration into the run's folder, whole or not at all."""
  text = json.dumps(defaults(config), indent=2) + "\n"
  write_atomically(workdir / CONFIG_FILE, text.encode())


def read(workdir: epath.Path) -> ExperimentConfig:
  """The resolved configuration of a run.

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


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    path = f"{prefix}.{key}"
    flat.update(_flat(value, path) if isinstance(value, Mapping) else {path: value})
  return flat


def check_same_run(before: ExperimentConfig, now: ExperimentConfig) -> None:
  """Whether a run can go on with another configuration.

  Raises:
    InputError: model or data differ from what the run was made with, the optimizer keeps other
      things than it did, or batches would hold other rows.
  """
  old, new = defaults(before), defaults(now)
  if not now.model.vocab_size:  # Taken from the tokenizer, which the data decide.
    new["model"]["vocab_size"] = before.model.vocab_size
  lines = []
  for part in ("model", "data"):
    was, now_is = _flat(old[part], f"config.{part}"), _flat(new[part], f"config.{part}")
    lines += [
        f"  {key}: the run has {was.get(key)!r}, now {now_is.get(key)!r}"
        for key in sorted(was.keys() | now_is.keys())
        if was.get(key) != now_is.get(key) and key not in _FREE
    ]
  kept = {  # Fields of the optimizer, and what of them decides the form of its state.
      "clip_norm": bool, "first_moment_dtype": str, "second_moment_dtype": str,
  }
  lines += [
      f"  config.optimizer.{key}: the run has {old['optimizer'][key]!r}, now "
      f"{new['optimizer'][key]!r}, with which its optimizer's state cannot go on"
      for key, form in kept.items() if form(old["optimizer"][key]) != form(new["optimizer"][key])
  ]
  if lines:
    raise InputError(
        "the run in --workdir was made with another model, data or optimizer:\n"
        + "\n".join(lines)
        + "\nGive the same values to go on with it, or another --workdir."
    )
  # What the order of the batches depends on; their position in it says so too, but later.
  for key, began, asked in (
      ("config.seed", before.seed, now.seed),
      ("config.train.batch_size", before.train.batch_size, now.train.batch_size),
  ):
    if began != asked:
      raise invalid(key, asked, f"{began}, with which the run began")
