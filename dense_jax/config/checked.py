"""`Config`, the base of config dataclasses, which checks their fields whoever makes them."""

import dataclasses
import typing
from typing import Any, ClassVar

from dense_jax.config.fields import invalid


def field_types(cls: type) -> dict[str, Any]:
  """Returns the fields of a config dataclass and their annotated types."""
  hints = typing.get_type_hints(cls)
  return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def checked(key: str, value: Any, annotation: Any, field: "dataclasses.Field[Any]") -> Any:
  """Returns a field's value as its type; an int is also a float, nothing else is converted.

  Args:
    key: the field's dotted path, for error messages.
    value: the value.
    annotation: the field's type.
    field: the field, as `dense_jax.config.fields` declares it.

  Raises:
    InputError: the value has the wrong type or is out of range.
  """
  if annotation is Any:
    return value
  given = value
  if annotation is float and type(value) is int and abs(value) < 2**1023:  # A float holds it.
    value = float(value)
  if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
    raise invalid(key, given, f"a value of type {annotation.__name__}")
  if "check" in field.metadata and not field.metadata["check"](value):
    raise invalid(key, given, field.metadata["valid"])
  return value


class Config:
  """The base of config dataclasses. Their own checks of several fields follow its `__post_init__`.

  Class arguments:
    key: the dotted path at which the class stands, for error messages; a subclass inherits it.
  """

  key: ClassVar[str]

  def __init_subclass__(cls, key: str = "") -> None:
    super().__init_subclass__()
    if key:
      cls.key = key

  def __post_init__(self) -> None:
    types = field_types(type(self))
    for field in dataclasses.fields(self):  # type: ignore[arg-type]  # Subclasses are dataclasses.
      value = getattr(self, field.name)
      value = checked(f"{self.key}.{field.name}", value, types[field.name], field)
      object.__setattr__(self, field.name, value)
