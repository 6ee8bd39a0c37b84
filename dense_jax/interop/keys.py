"""Reads the `config.json` of a checkpoint key by key, and checks the values."""

import sys
from collections.abc import Mapping
from typing import Any

from dense_jax.config import LARGEST, invalid
from dense_jax.errors import InputError
from dense_jax.interop.layout import Config


class Keys:
  """The keys of a `config.json`; a key that is missing or null has its default.

  If a value is not valid, methods raise an InputError that names the key, the value and what
  would be valid.
  """

  def __init__(self, config: Config, defaults: Mapping[str, Any]) -> None:
    self._values = {**defaults, **{k: v for k, v in config.items() if v is not None}}

  def get(self, key: str) -> Any:
    """Returns a key's value, unchecked; None if the key has neither a value nor a default."""
    return self._values.get(key)

  def invalid(self, key: str, valid: str) -> InputError:
    """Returns the error for a key's value; `valid` says what would be valid."""
    return invalid(f"config.json: {key}", self.get(key), valid)

  def only(self, key: str, *valid: Any) -> None:
    """Checks that a value is one of those that this project's models support."""
    value = self.get(key)
    if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in valid):
      raise self.invalid(key, " or ".join(map(repr, valid)))

  def integer(self, key: str, low: int = 1, high: int = LARGEST) -> int:
    """Returns an integer from `low` to `high`."""
    value = self.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
      raise self.invalid(key, f"an integer >= {low} and <= {high}")
    return value

  def layers(self, key: str) -> int:
    """Returns a number of layers, at most 1000: layers are not scanned, so more is a mistake."""
    return self.integer(key, high=1000)

  def positive(self, key: str) -> float:
    """Returns a finite number > 0."""
    value = self.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
      raise self.invalid(key, "a number > 0")
    return float(value)

  def flag(self, key: str) -> bool:
    """Returns a boolean."""
    self.only(key, False, True)
    return self.get(key)
