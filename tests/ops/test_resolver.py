"""Tests of the resolver: the choice of "auto", and errors for bad requests."""

import logging

import jax
import pytest

from dense_jax.config import ModelConfig, field_types
from dense_jax.errors import InputError
from dense_jax.ops import resolver
from dense_jax.ops.cpu import cpu_matmul
from dense_jax.ops.matrix.cpu import cpu_matrix_step


@pytest.mark.parametrize(("form", "platform", "expected"), [
    ("diagonal", "cpu", "recurrent"),
    ("diagonal", "tpu", "pallas"),
    ("diagonal", "gpu", "triton"),
    ("matrix", "cpu", "chunked"),
    ("matrix", "tpu", "pallas"),
    ("matrix", "gpu", "triton"),
])
def test_auto(form, platform, expected):
  with resolver.compiling_for(platform):
    assert resolver.resolve(form, "auto") == expected


@pytest.mark.parametrize("form", resolver.IMPLEMENTATIONS)
def test_auto_looks_at_the_platform_that_runs(form):
  with resolver.compiling_for(jax.default_backend()):
    expected = resolver.resolve(form, "auto")
  assert resolver.resolve(form, "auto") == expected


def test_another_platform_is_compiled_for_inside_only():
  before = resolver.resolve("diagonal", "auto")
  other = "cpu" if jax.default_backend() == "gpu" else "gpu"
  with pytest.raises(RuntimeError), resolver.compiling_for(other):
    assert resolver.resolve("diagonal", "auto") != before
    raise RuntimeError
  assert resolver.resolve("diagonal", "auto") == before


def test_a_request_is_what_runs_everywhere():
  for form, options in resolver.IMPLEMENTATIONS.items():
    for requested in options:
      for platform in ("cpu", "gpu", "tpu"):
        with resolver.compiling_for(platform):
          expected = requested
          if resolver.PLATFORMS.get(requested, platform) != platform:
            expected += " (interpreted)"
          assert resolver.resolve(form, requested) == expected


@pytest.mark.parametrize(("form", "requested"), [("diagonal", "chunked"), ("matrix", "conv")])
def test_a_bad_request_names_the_field_the_value_and_the_options(form, requested):
  with pytest.raises(InputError) as error:
    resolver.resolve(form, requested)
  for part in ("config.model.implementation", repr(requested), form, "auto",
               *resolver.IMPLEMENTATIONS[form]):
    assert part in str(error.value)


def test_the_choice_is_logged_once(caplog):
  resolver._choose.cache_clear()
  with caplog.at_level(logging.INFO, logger=resolver.__name__), resolver.compiling_for("tpu"):
    for _ in range(3):
      resolver.resolve("matrix", "auto")
  assert [record.getMessage() for record in caplog.records] == [
      "implementation of matrix states on tpu: pallas"
  ]


def test_every_form_takes_only_what_the_configuration_knows():
  valid = next(
      field for field in ModelConfig.__dataclass_fields__.values()
      if field.name == "implementation"
  ).metadata["valid"]
  assert "implementation" in field_types(ModelConfig)
  for options in resolver.IMPLEMENTATIONS.values():
    for name in options:
      assert name in valid


def test_workarounds_for_a_cpu_run_on_a_cpu_alone():
  for platform, workaround in (("cpu", True), ("gpu", False), ("tpu", False)):
    with resolver.compiling_for(platform):
      assert (resolver.matmul_function() is cpu_matmul) == workaround
      assert (resolver.matrix_form("auto", 0).step is cpu_matrix_step) == workaround


def test_a_train_step_has_options_for_a_gpus_compiler_alone():
  for platform, expected in (("cpu", False), ("tpu", False), ("gpu", True)):
    with resolver.compiling_for(platform):
      assert bool(resolver.training_options()) == expected
