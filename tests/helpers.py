"""What tests share: one table of tolerances, one comparison of trees, the compilers."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from dense_jax import experiment
from dense_jax.config import ExperimentConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Of a subprocess that computes at toy size: compiling is most of the time, so that it is done
# without optimisation, and once for programs that tests share.
TOY_ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax_tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}

# One row a dtype of the computation. A test that does not pass is mended, never its row.
TOLERANCE = {
    "float32": {"rtol": 1e-4, "atol": 1e-5},
    "bfloat16": {"rtol": 3e-2, "atol": 3e-2},
}


def assert_trees_close(
    actual: Any, expected: Any, dtype: str = "float32", scale: float = 1.0
) -> None:
  """Asserts that two pytrees of arrays agree; the error names every leaf that does not.

  Integers and booleans must be equal, shapes too, and a NaN equals nothing.

  Args:
    actual: the tree under test.
    expected: the tree to compare with, of the same structure.
    dtype: that of the computation, a row of `TOLERANCE`.
    scale: the natural size of the values where it is not about 1 (a sum's gradient); the
      absolute tolerance is relative to it.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(actual)
  expected_leaves, expected_structure = jax.tree_util.tree_flatten(expected)
  assert structure == expected_structure, (
      f"the trees differ in structure:\n{structure}\n{expected_structure}"
  )
  tolerance = TOLERANCE[dtype]
  differing = [
      f"{jax.tree_util.keystr(path) or 'the array'}: {difference}"
      for (path, leaf), expected_leaf in zip(leaves, expected_leaves, strict=True)
      if (
          difference := _difference(
              np.asarray(leaf),
              np.asarray(expected_leaf),
              tolerance["rtol"],
              tolerance["atol"] * scale,
          )
      )
  ]
  assert not differing, f"{len(differing)} of {len(leaves)} leaves differ:\n" + "\n".join(differing)


def scale_of(gradients: Any) -> float:
  """The greatest absolute value of a tree's leaves, or 1 if that is more.

  A gradient's rounding reaches every leaf from the largest ones.
  """
  return max(1.0, *(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)))


def tpu_compiler_environment() -> dict[str, str]:
  """The environment of a subprocess that compiles for TPUs, on a machine without one.

  A subprocess, because libtpu must not be found by the tests' own jax. Skips the test where
  the compiler is not installed.
  """
  folder = pathlib.Path(sys.prefix) / "tpu_compiler"
  if not folder.is_dir():
    pytest.skip("no TPU compiler here; `make test` installs it on Linux x86-64")
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return environment | {
      "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
      "JAX_PLATFORMS": "cpu",
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_ACCELERATOR_TYPE": "v5litepod-4",
      "TPU_WORKER_HOSTNAMES": "localhost",
      # Its lock file guards chips; here it would only keep tests from running side by side.
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }


def gpu_compiler_python() -> str:
  """The Python of the environment that has the GPU compiler.

  Skips the test where no such environment was made. One that is named, or was begun, must work.
  """
  named = os.environ.get("DENSE_JAX_GPU_COMPILER")
  folder = pathlib.Path(named) if named else pathlib.Path(sys.prefix) / "gpu_compiler"
  if not named and not folder.is_dir():
    pytest.skip("no GPU compiler here; `make gpu-compiler` installs it on Linux x86-64")
  python = folder / "bin" / "python"
  assert python.is_file(), f"{folder} has no Python"
  return str(python)


def run_with_gpu_compiler(script: str, *, timeout: float) -> Any:
  """Runs a script, named from the root, where the GPU compiler is; returns its last line's JSON."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  result = subprocess.run(
      [gpu_compiler_python(), ROOT / script],
      env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
      capture_output=True, text=True, timeout=timeout, check=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  return json.loads(result.stdout.splitlines()[-1])


def write_text(folder: pathlib.Path) -> pathlib.Path:
  """Four small documents in a folder, which is returned."""
  for index in range(4):
    lines = [f"line {line} of file {index}: {line * 7919 % 1000}\n" for line in range(80)]
    (folder / f"{index}.txt").write_text("".join(lines))
  return folder


def tiny_experiment(
    text: pathlib.Path, overrides: Sequence[tuple[str, str]] = ()
) -> ExperimentConfig:
  """Returns smoke:debug on the documents of `write_text`, of a family that compiles fast."""
  return experiment.load("experiments/smoke.py:debug", [
      ("data.path", str(text)), ("data.cache_dir", f"{text}/.cache"), ("data.heldout_every", "2"),
      ("data.seq_len", "32"), ("train.batch_size", "8"), ("model.width", "16"),
      ("model.family", "gau_retnet"), *overrides,
  ])


def _difference(actual: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> str:
  """How two arrays differ, in words; empty where they agree."""
  if actual.shape != expected.shape:
    return f"shape {actual.shape}, expected {expected.shape}"
  if all(array.dtype.kind in "biu" for array in (actual, expected)):
    rtol = atol = 0.0
  # Both complex and bfloat16 arrays have an exact home here.
  kind = np.complex128 if "c" in (actual.dtype.kind, expected.dtype.kind) else np.float64
  actual, expected = actual.astype(kind), expected.astype(kind)
  wrong = ~np.isclose(actual, expected, rtol=rtol, atol=atol)
  if not wrong.any():
    return ""
  with np.errstate(divide="ignore", invalid="ignore"):
    absolute = np.abs(actual - expected)
    relative = np.where(absolute == 0, 0, absolute / np.abs(expected))
  first = tuple(int(i) for i in np.argwhere(wrong)[0]) if actual.ndim else ()
  return (
      f"{int(wrong.sum())} of {actual.size} values of shape {actual.shape} differ, "
      f"max absolute {np.max(absolute):.3g}, max relative {np.max(relative):.3g} "
      f"(allowed: {atol:g} + {rtol:g} relative); first at {first}: "
      f"{actual[first]:.6g}, expected {expected[first]:.6g}"
  )


def changed(tree: Any, **change: Callable[[Any], Any]) -> Any:
  """Returns a dataclass with fields replaced by functions of themselves."""
  return dataclasses.replace(tree, **{name: of(getattr(tree, name)) for name, of in change.items()})
