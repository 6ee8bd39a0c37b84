"""Config keys in documents: they exist, and take the values that they are given."""

import dataclasses
import functools
import re

from dense_jax import experiment
from dense_jax.config import ExperimentConfig, field_types
from dense_jax.errors import InputError
from dense_jax.models.registry import FAMILIES


@functools.cache
def _keys() -> dict[str, list[tuple[dataclasses.Field | None, type]]]:
  """Dotted key -> (field, type), of which families' options have many; a group has no field."""
  keys: dict[str, list[tuple[dataclasses.Field | None, type]]] = {"config": [(None, object)]}

  def add(cls: type, path: str) -> None:
    types = field_types(cls)
    for field in dataclasses.fields(cls):
      kind, key = types[field.name], f"{path}.{field.name}"
      is_group = dataclasses.is_dataclass(kind) or field.name == "mixer"
      keys.setdefault(key, []).append((None if is_group else field, kind))
      if dataclasses.is_dataclass(kind):
        add(kind, key)

  add(ExperimentConfig, "config")
  for family in FAMILIES.values():
    add(family.config, "config.model.mixer")
  return keys


def key_problem(key: str, value: str = "") -> str | None:
  """Says what is wrong with a key, or the end of one, and the value that it is given."""
  if re.fullmatch(r"[A-Z_0-9]+", key):  # Of the environment, or a placeholder.
    return None
  key = key.removeprefix("--").removeprefix("config.").rstrip(".")
  found = [
      fields for path, fields in _keys().items() if f".{path}".endswith(f".{key}")
  ]
  if not found:
    return f"there is no config key {key}"
  placeholder = re.fullmatch(r"[A-Z]*", value)
  if not placeholder and not any(
      _takes(field, kind, value) for fields in found for field, kind in fields
  ):
    return f"{value} is no value of the config key {key}"
  return None


def _takes(field: dataclasses.Field | None, kind: type, value: str) -> bool:
  if field is None:
    return False
  try:
    return field.metadata["check"](experiment._parse(field.name, value, kind))
  except InputError:
    return False


