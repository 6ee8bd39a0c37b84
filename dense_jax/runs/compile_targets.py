"""The chips to compile for: devices of TPU and GPU topologies, without any such chip.

The TPU compiler (libtpu) is a library that jax loads. The GPU compiler is jax's CUDA plugin, whose
libraries take gigabytes: `make gpu-compiler` puts it into a Python environment of its own, and
commands that need it run there.
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from dense_jax.config import MeshConfig, defaults, invalid
from dense_jax.costs.chips import CHIPS, Chip
from dense_jax.errors import InputError
from dense_jax.runs import gpu_target

# The environment variable that names a Python environment with the GPU compiler.
GPU_COMPILER = "DENSE_JAX_GPU_COMPILER"
_FORMS = {1: "8", 2: "4x4", 3: "2x2x1"}
# Values that libtpu would otherwise request from a cloud machine's metadata server.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # libtpu's lock file protects chips, and there are none here.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_chip(topology: str) -> Chip:
  """Returns the figures of a topology's chips.

  Raises:
    InputError: there is no such kind of chip, or its topologies have another form.
  """
  kind, _, shape = topology.partition(":")
  axes = CHIPS[kind].axes if kind in CHIPS else 0
  if not axes or not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (axes - 1), shape):
    raise _invalid_topology(topology)
  return CHIPS[kind]


def topology_devices(topology: str) -> list[jax.Device]:
  """Returns the chips of a topology, as devices to compile for.

  Raises:
    InputError: there is no such topology, or its compiler is not installed.
  """
  chip = topology_chip(topology)
  kind, _, shape = topology.partition(":")
  if chip.is_gpu:
    _prepare_gpu()
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{shape}",  # Slices, hosts, devices.
        target_config=gpu_target.target_config(kind),
    )
    return list(found.devices)
  sizes = [int(size) for size in shape.split("x")]
  options: dict[str, Any] = {}
  if math.prod(sizes) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if kind == "v4":  # Otherwise each of a chip's two cores is a device.
    options["chip_config_name"] = "megacore"
  _prepare_tpu(kind)
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f"{_invalid_topology(topology)}; the compiler says: {error}") from error
  return list(found.devices)


def fit_mesh(config: MeshConfig, count: int) -> MeshConfig:
  """Returns `config` if it has `count` devices, else a mesh with fsdp over all of them."""
  sizes = [size or 1 for size in defaults(config).values()]
  fixed = math.prod(size for size in sizes if size != -1)
  fits = fixed == count or (-1 in sizes and fixed and count % fixed == 0)
  return config if fits else dataclasses.replace(config, data=1, fsdp=-1, sequence=1, tensor=1)


def run_elsewhere(topology: str, module: str, arguments: Sequence[str]) -> int | None:
  """Runs a command in the environment that has the topology's compiler, if that is another one.

  Args:
    topology: the chips.
    module: the command's module.
    arguments: its command-line arguments.

  Returns:
    The command's exit status; None if this process has the compiler, or no environment has it
    (then `topology_devices` says how to install it), or there is no such topology.
  """
  chip = CHIPS.get(topology.partition(":")[0])
  if chip is None or not chip.is_gpu or _has_cuda():
    return None
  python = _gpu_environment() / "bin" / "python"
  if not python.is_file():
    return None
  root = str(pathlib.Path(__file__).resolve().parents[2])
  path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
  return subprocess.run(
      [str(python), "-m", module, *arguments], env=os.environ | {"PYTHONPATH": path}, check=False
  ).returncode


def _invalid_topology(topology: str) -> InputError:
  known = ", ".join(f"{kind}:{_FORMS[chip.axes]}" for kind, chip in CHIPS.items())
  return invalid("--topology", topology, f"KIND:CHIPS along each axis, such as {known}")


def _prepare_tpu(kind: str) -> None:
  """Lets jax find the TPU compiler, and keeps it from looking for chips.

  It may be called after jax is imported, but only before libtpu is loaded.

  Raises:
    InputError: no TPU compiler is installed.
  """
  accelerator = {"v5e": "v5litepod-4", "v6e": "v6e-4"}.get(kind, f"{kind}-8")
  for name, value in (_ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": accelerator}).items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")
  if importlib.util.find_spec("libtpu") is None:
    # Not in site-packages: from there, jax would look for chips in every process.
    folder = pathlib.Path(sys.prefix) / "tpu_compiler"
    if not folder.is_dir():
      raise InputError(
          "there is no TPU compiler (libtpu) here: pip install -e '.[tpu]' on Linux x86-64, or "
          f"`make test`, which puts it into {folder}"
      )
    sys.path.append(str(folder))


def _prepare_gpu() -> None:
  """Keeps jax from looking for GPUs.

  Raises:
    InputError: no GPU compiler is installed.
  """
  jax.config.update("jax_platforms", "cpu")
  if not _has_cuda():
    raise InputError(
        "there is no GPU compiler (jax's CUDA plugin) here: `make gpu-compiler` puts it into "
        f"{_gpu_environment()}, on Linux x86-64; the variable {GPU_COMPILER} names another place"
    )


def _has_cuda() -> bool:
  return importlib.util.find_spec("jax_cuda13_plugin") is not None


def _gpu_environment() -> pathlib.Path:
  """Returns the folder of the Python environment for the GPU compiler."""
  named = os.environ.get(GPU_COMPILER)
  return pathlib.Path(named) if named else pathlib.Path(sys.prefix) / "gpu_compiler"
