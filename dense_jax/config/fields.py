"""Fields of config dataclasses, each with its default, its valid values and its meaning.

A field's metadata holds "valid" (the words of error messages), "check" (a function that returns
whether a value of the right type is valid) and "help" (one line of meaning, which `--help-config`
and docs/configuration.md show).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from dense_jax.errors import InputError, did_you_mean

LARGEST = 2**31 - 1  # Steps, tokens and sizes are int32 on devices.
LARGEST_SEED = 2**32 - 1  # jax takes a seed's low 32 bits: a larger one would equal a smaller one.


def _field(default: Any, valid: str, check: Callable[[Any], bool], help: str) -> Any:
  return dataclasses.field(
      default=default, metadata={"valid": valid, "check": check, "help": help}
  )


def choice(default: str, *options: str, help: str) -> Any:
  """Declares a field whose value is one of `options`."""
  return _field(default, "one of " + ", ".join(options), lambda value: value in options, help)


def integer(default: int, low: int, high: int = LARGEST, *, help: str) -> Any:
  """Declares a field whose value is an integer in [low, high]."""
  valid = f"an integer >= {low} and <= {high}"
  return _field(default, valid, lambda value: low <= value <= high, help)


def number(
    default: float, low: float, high: float = math.inf, *, open_low: bool = False,
    open_high: bool = False, help: str,
) -> Any:
  """Declares a field whose value is a finite number in [low, high]; an open end is excluded."""
  valid = f"a number {'>' if open_low else '>='} {low:g}"
  valid += "" if math.isinf(high) else f" and {'<' if open_high else '<='} {high:g}"
  above = float.__gt__ if open_low else float.__ge__
  below = float.__lt__ if open_high else float.__le__
  return _field(
      default, valid, lambda v: math.isfinite(v) and above(v, low) and below(v, high), help
  )


def flag(default: bool, *, help: str) -> Any:
  """Declares a field whose value is true or false."""
  return _field(default, "true or false", lambda value: True, help)


def text(default: str, valid: str, *, help: str) -> Any:
  """Declares a text field. Its user checks it; `valid` describes the valid values."""
  return _field(default, valid, lambda value: True, help)


def group(cls: type | None, *, help: str) -> Any:
  """Declares a field that is a group of keys: an instance of `cls`, or None for any class."""
  metadata = {"help": help}
  if cls is None:
    return dataclasses.field(default=None, metadata=metadata)
  return dataclasses.field(default_factory=cls, metadata=metadata)


def invalid(key: str, value: Any, valid: str) -> InputError:
  """Makes the error of a value that is not valid, in one wording."""
  return InputError(f"{key} = {value!r} is not valid: expected {valid}")


def unknown_key(key: str, known: list[str]) -> InputError:
  """Makes the error of a key that does not exist, naming the nearest one that does."""
  parent, _, name = key.rpartition(".")
  prefix = parent + "." if parent else ""
  hint = did_you_mean(name, known, prefix)
  return InputError(f"unknown key {key}{hint} Valid keys: {', '.join(prefix + k for k in known)}")
