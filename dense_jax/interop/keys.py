"""Reading a foreign `config.json` key by key."""

import sys
from collections.abc import Mapping
from typing import Any

from dense_jax.config import LARGEST, invalid
from dense_jax.errors import InputError
from dense_jax.interop.layout import Config


class Keys:
  """The keys of a `config.json`; one that is missing or null has its default.

  Every method raises an InputError that names the key, its value and what is valid.
  """

  def __init__(self, config: Config, defaults: Mapping[str, Any]) -> None:
    self._values = {**defaults, **{k: v for k, v in config.items() if v is not None}}

  def get(self, key: str) -> Any:
    """The value as it is; None if it has neither a value nor a default."""
    return self._values.get(key)

  def invalid(self, key: str, valid: str) -> InputError:
    """The error of that key's value."""
    return invalid(f"config.json: {key}", self.get(key), valid)

  def only(self, key: str, *valid: Any) -> None:
    """Requires one of the values that this project's models compute with."""
    value = self.get(key)
    if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in valid):
      raise self.invalid(key, " or ".join(map(repr, valid)))

  def integer(self, key: str, low: int = 1, high: int = LARGEST) -> int:
    """An integer from `low` to `high`."""
    value = self.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
      raise self.invalid(key, f"an integer >= {low} and <= {high}")
    return value

  def layers(self, key: str) -> int:
    """A number of layers, each of which is compiled apart: more than 1000 are a mistake."""
    return self.integer(key, high=1000)

  def positive(self, key: str) -> float:
    """A finite number > 0."""
    value = self.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
      raise self.invalid(key, "a number > 0")
    return float(value)

  def flag(self, key: str) -> bool:
    """true or false."""
    self.only(key, False, True)
    return self.get(key)
