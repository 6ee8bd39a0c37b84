"""Config dataclasses: what every field says of itself, and what `build` refuses."""

import dataclasses

import pytest

from dense_jax.config import (
  DenseConfig,
  ExperimentConfig,
  ModelConfig,
  OptimizerConfig,
  build,
  choice,
  defaults,
  field_types,
  flag,
  group,
  integer,
  number,
  text,
)
from dense_jax.errors import InputError
from dense_jax.models.registry import FAMILIES


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = number(0.5, 0, 1, open_low=True, open_high=True, help="a rate")
  name: str = text("x", "any text", help="a name")


@dataclasses.dataclass(frozen=True)
class Outer:
  size: int = integer(3, 1, 9, help="a size")
  kind: str = choice("a", "a", "b", help="a kind")
  fast: bool = flag(False, help="whether it is fast")
  inner: Inner = group(Inner, help="more")


def _classes(cls):
  yield cls
  for kind in field_types(cls).values():
    if dataclasses.is_dataclass(kind):
      yield from _classes(kind)


CLASSES = [*_classes(ExperimentConfig), *(family.config for family in FAMILIES.values())]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_means_and_its_default_is_valid(cls):
  for field in dataclasses.fields(cls):
    assert field.metadata.get("help"), f"{cls.__name__}.{field.name} has no help"
    if "check" in field.metadata:
      assert field.metadata["check"](field.default), field.name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_python_code_is_refused_in_the_same_words(cls):
  for name, kind in field_types(cls).items():
    if dataclasses.is_dataclass(kind):
      wrong, valid = "?", f"a value of type {kind.__name__}"
    elif kind is int:
      wrong, valid = -(2**40), "an integer >= "
    elif kind in (float, bool):
      wrong, valid = "1", f"a value of type {kind.__name__}"
    elif kind is str:
      wrong, valid = 1, "a value of type str"
    else:
      continue
    with pytest.raises(InputError) as error:
      cls(**{name: wrong})
    assert str(error.value).startswith(
        f"{cls.key}.{name} = {wrong!r} is not valid: expected {valid}"
    )


def test_python_code_is_refused_before_fields_are_compared():
  with pytest.raises(InputError, match=r"config\.model\.layers = -3 is not valid: expected an int"):
    ModelConfig(layers=-3)
  with pytest.raises(InputError, match=r"config\.model\.remat = 'recompute' .* one of none"):
    ModelConfig(remat="recompute")
  with pytest.raises(InputError, match=r"config\.model\.dense\.gate_sharing = 'sharde' is not"):
    DenseConfig(gate_sharing="sharde")
  one = OptimizerConfig(learning_rate=1)
  assert isinstance(one.learning_rate, float) and one == OptimizerConfig(learning_rate=1.0)


def test_a_nested_dict_and_back():
  values = {"size": 4, "kind": "b", "fast": True, "inner": {"rate": 0.25, "name": "y"}}
  config = build(Outer, values)
  assert config == Outer(4, "b", True, Inner(0.25, "y"))
  assert defaults(config) == values
  assert defaults(Outer)["inner"] == {"rate": 0.5, "name": "x"}
  assert build(Outer, {"inner": {}}) == Outer()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "config.size = 0 is not valid: expected an integer >= 1 and <= 9"),
        ({"size": True}, "config.size = True is not valid: expected a value of type int"),
        ({"size": 2.0}, "config.size = 2.0 is not valid: expected a value of type int"),
        ({"kind": "c"}, "config.kind = 'c' is not valid: expected one of a, b"),
        ({"fast": 1}, "config.fast = 1 is not valid: expected a value of type bool"),
        ({"inner": 1}, "config.inner = 1 is not valid: expected the keys rate, name"),
        ({"inner": {"rate": 1}}, "config.inner.rate = 1 is not valid: expected a number > 0 and <"),
        ({"inner": {"rate": float("nan")}}, "expected a number > 0 and < 1"),
        ({"inner": {"name": None}}, "expected a value of type str"),
        ({"inner": {"nmae": "x"}}, "unknown key config.inner.nmae; did you mean config.inner.name"),
    ],
)
def test_what_is_not_valid_is_refused_by_name(values, message):
  with pytest.raises(InputError) as error:
    build(Outer, values)
  assert message in str(error.value)
