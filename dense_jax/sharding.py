"""Meshes, and where parameters and batches live on them.

Every parameter names its logical axes; one table maps those to mesh axes. The batch is
split over `data` and `fsdp` together. Modules contain no sharding code.
"""

import contextlib
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dense_jax.config import MeshConfig, defaults, invalid
from dense_jax.types import BATCH_AXES, WIDTH_AXIS, Array, InputError, Params

# Logical axis -> mesh axis. What is not here is not split.
RULES = {"embed": "fsdp", "vocab": WIDTH_AXIS, "heads": WIDTH_AXIS, "inner": WIDTH_AXIS}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh of `config` over all devices (or the given ones).

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = defaults(config)
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or 0 in sizes.values():
    raise invalid("config.mesh", sizes, "sizes >= 1, at most one of them -1")
  if len(devices) % fixed or (not free and fixed != len(devices)):
    raise invalid("config.mesh", sizes, f"sizes whose product is {len(devices)}, the devices")
  for axis in free:
    sizes[axis] = len(devices) // fixed
  grid = np.asarray(devices).reshape(tuple(sizes.values()))
  return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
  """Raises InputError where the mesh does not divide an accumulation step's batch."""
  parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if batch_size % (parts * accumulate):
    raise invalid(
        "config.train.batch_size", batch_size,
        f"a multiple of mesh.data * mesh.fsdp * train.accumulate = {parts * accumulate}",
    )


def param_shardings(
    axes: dict[str, tuple[str | None, ...]], shapes: dict[str, tuple[int, ...]], mesh: Mesh
) -> dict[str, NamedSharding]:
  """Each parameter's sharding.

  Raises:
    InputError: a dimension is not divisible by its mesh axis; it names both.
  """
  shardings = {}
  for name, logical in axes.items():
    spec = tuple(RULES.get(axis) if axis else None for axis in logical)
    for size, axis in zip(shapes[name], spec, strict=True):
      if axis and size % mesh.shape[axis]:
        raise InputError(
            f"config.mesh.{axis} = {mesh.shape[axis]} is not valid: it does not divide a "
            f"dimension of {size} of {name}, shape {shapes[name]}"
        )
    shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
  return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(placed: NamedSharding, shape: tuple[int, int]) -> slice:
  """The rows of a global (B, T) array that this process's devices need."""
  parts = placed.addressable_devices_indices_map(shape).values()
  ranges = [part[0].indices(shape[0]) for part in parts if part is not None]
  return slice(min(low for low, _, _ in ranges), max(high for _, high, _ in ranges))


def put_rows(rows_BT: np.ndarray, rows: slice, batch_size: int, placed: NamedSharding) -> Array:
  """A global array of `batch_size` rows, of which this process has `rows`, whole ones."""

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # It is of an own device, which has some of every array.
    low, high, _ = index[0].indices(batch_size)
    return rows_BT[(slice(low - rows.start, high - rows.start), *index[1:])]

  return jax.make_array_from_callback((batch_size, *rows_BT.shape[1:]), placed, part)


@contextlib.contextmanager
def mesh_of(params: Params) -> Iterator[None]:
  """Programs that are traced inside know the mesh on which the parameters are; kernels ask."""
  placed = next(iter(params.values())).sharding
  if not isinstance(placed, NamedSharding):
    yield
    return
  with jax.sharding.use_abstract_mesh(placed.mesh.abstract_mesh):
    yield


def split_rows(x: Array) -> Array:
  """x, with its first axis split as the batch is, on the mesh that is in use, if there is one.

  Parameters are split over `fsdp` too. Where activations do not say that they keep their rows,
  the compiler may leave a matrix in its parts and move the activations instead.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def describe_mesh(mesh: Mesh) -> str:
  """Such as `data 4 x fsdp 2 x tensor 1`."""
  return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
