"""Tests of the check of kernels before a run: right ones run, wrong ones are found and left out."""

import jax.numpy as jnp
import pytest

from dense_jax.errors import InputError
from dense_jax.ops import resolver
from dense_jax.ops.injection import inject
from dense_jax.ops.kernel_check import LIMITS, kernel_errors
from dense_jax.ops.matrix.sequence import AssociativeMatrix, ChunkedMatrix
from dense_jax.ops.recurrence import Sizes
from dense_jax.runs.kernels import check_kernels
from tests.builders import model_config

CONFIG = model_config("mamba2")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
  """Lets a form that every platform has stand for a platform's kernels."""
  monkeypatch.setattr(resolver, "KERNELS", {("matrix", "cpu"): "associative"})
  monkeypatch.setattr(resolver, "_REFUSED", set())
  resolver._choose.cache_clear()
  yield
  resolver._choose.cache_clear()


def _spoil(monkeypatch, spoiled):
  """Makes the stand-in kernels compute something else."""

  def scan(self, query):
    y, final = ChunkedMatrix._scan(self, query)
    return spoiled(y), final

  monkeypatch.setattr(AssociativeMatrix, "_scan", scan)


@pytest.mark.parametrize("dtype", LIMITS)
def test_right_kernels_are_within_the_limits(dtype):
  errors = kernel_errors("matrix", "associative", Sizes(4, 2, 6, 10), dtype)
  assert {"y", "final", "moments"} <= errors.keys()
  gradients = {f"gradient.{of}.{name}" for of in ("own", "source", "other")
               for name in ("k", "x", "scale", "log_decay", "initial")}
  gradients |= {f"gradient.{name}" for name in ("skip", "query", "z")}
  gradients |= {"gradient.gate.hidden_R", "gradient.gate.up_RE"}
  assert errors.keys() == gradients | {"y", "final", "moments"}
  # A low-rank gate is rounded to the dtype before it multiplies.
  assert max(errors.values()) < LIMITS[dtype] / 2


@pytest.mark.slow
def test_right_diagonal_kernels_are_within_the_limits():
  errors = kernel_errors("diagonal", "associative", Sizes(1, 1, 6, 3), "float32")
  assert len(errors) == 2 + 3 * 5 + 5
  assert max(errors.values()) < LIMITS["float32"] / 3


@pytest.mark.slow
def test_input_injection_is_checked_where_layers_do_it(monkeypatch, capsys):
  sizes = Sizes(4, 2, 6, 10)
  errors = kernel_errors("matrix", "associative", sizes, "bfloat16", injection=True)
  errors = {name: error for name, error in errors.items() if "injection" in name}
  gradients = {f"gradient.{name}" for name in ("own", "source", "hidden", "up", "scale")}
  assert errors.keys() == {f"injection.{name}" for name in gradients | {"y"}}
  assert max(errors.values()) < LIMITS["bfloat16"] / 2

  def spoiled(form, requested):
    del form
    scale = 1.0 if requested == "recurrent" else 1.1
    return lambda own, *rest: inject(scale * own, *rest)

  monkeypatch.setattr(resolver, "injection", spoiled)
  assert check_kernels(CONFIG)
  assert not check_kernels(model_config("mamba2", 1, "inputs"))
  assert "injection.y by" in capsys.readouterr().err


def test_right_kernels_run(capsys):
  assert check_kernels(CONFIG)
  assert resolver.resolve("matrix", "auto") == "associative"
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("spoiled", [
    pytest.param(lambda y: 1.01 * y, id="scaled"),
    pytest.param(lambda y: y.at[:, 141].set(y[:, 140]), id="one-token", marks=pytest.mark.slow),
    pytest.param(lambda y: y * jnp.nan, id="nan", marks=pytest.mark.slow),
])
def test_wrong_kernels_are_left_out_loudly(monkeypatch, capsys, spoiled):
  _spoil(monkeypatch, spoiled)
  assert not check_kernels(CONFIG)
  assert resolver.resolve("matrix", "auto") == "chunked"
  warning = capsys.readouterr().err
  for part in ("WARNING", "associative", "matrix", "y by", "'chunked'"):
    assert part in warning
  assert check_kernels(CONFIG)  # Nothing is left to check.


def test_strict_stops(monkeypatch):
  _spoil(monkeypatch, lambda y: 2 * y)
  with pytest.raises(InputError, match="--strict"):
    check_kernels(CONFIG, strict=True)


def test_what_was_asked_for_by_name_is_not_checked(monkeypatch):
  _spoil(monkeypatch, lambda y: 2 * y)
  assert check_kernels(model_config("mamba2", implementation="associative"))
  assert check_kernels(model_config("s4d"))
