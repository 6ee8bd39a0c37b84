"""Converts config dataclasses to nested dicts, and back with every check."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from dense_jax.config.checked import checked, field_types
from dense_jax.config.fields import invalid, unknown_key

ConfigT = TypeVar("ConfigT")


def defaults(config: Any) -> dict[str, Any]:
  """Returns a config dataclass (or a class, for its defaults) as a nested plain dict."""
  instance = config() if isinstance(config, type) else config
  return dataclasses.asdict(instance)


def build(
    cls: type[ConfigT],
    values: Mapping[str, Any],
    key: str = "config",
    variants: Mapping[str, type] | None = None,
) -> ConfigT:
  """Builds and validates a config dataclass from a nested dict.

  Args:
    cls: the dataclass.
    values: the values of its fields; a missing field takes its default.
    key: the dotted path of `values`, for error messages.
    variants: dotted path -> the dataclass to build there, for fields whose class depends on
      another field (`config.model.mixer` on the family).

  Raises:
    InputError: a key is unknown, or a value has the wrong type or is out of range.
  """
  variants = variants or {}
  types = field_types(cls)
  for name in values:
    if name not in types:
      raise unknown_key(f"{key}.{name}", list(types))
  built = {}
  for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # ConfigT is a dataclass
    if field.name not in values:
      continue
    path, value = f"{key}.{field.name}", values[field.name]
    nested: Any = variants.get(path, types[field.name])
    if isinstance(nested, type) and dataclasses.is_dataclass(nested):
      if not isinstance(value, Mapping):
        raise invalid(path, value, f"the keys {', '.join(field_types(nested))}")
      built[field.name] = build(nested, value, path, variants)
      continue
    built[field.name] = checked(path, value, types[field.name], field)
  return cls(**built)
