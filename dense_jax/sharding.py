"""Device meshes, and the shardings of parameters, batches and activations on them.

Parameters and activations have logical axes, and two tables, `PARAMETERS` and `ACTIVATIONS`, map
those to mesh axes. FSDP is nothing more than a difference between the tables: a matrix is stored
split along its `embed` axis, but is gathered for use, while the rows of the batch are split over
the same devices.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dense_jax.config import MeshConfig, defaults, invalid
from dense_jax.errors import InputError
from dense_jax.types import BATCH_AXES, SEQUENCE_AXIS, WIDTH_AXIS, Array, Params, PyTree

# Logical axis -> mesh axis. An axis that is not listed is not split.
PARAMETERS = {"embed": "fsdp", "vocab": WIDTH_AXIS, "heads": WIDTH_AXIS, "inner": WIDTH_AXIS}
ACTIVATIONS = {
    "batch": BATCH_AXES, "length": SEQUENCE_AXIS, "heads": WIDTH_AXIS, "inner": WIDTH_AXIS,
}


def mesh_sizes(config: MeshConfig, devices: int, slices: int = 1) -> dict[str, int]:
  """Returns the size of each axis of the mesh that `config` describes.

  Args:
    config: sizes by axis; a size of -1 takes the remaining devices, `slices` = 0 all slices.
    devices: the number of devices of all slices.
    slices: the number of TPU slices that the devices belong to.

  Raises:
    InputError: the sizes are not valid, or their product is not the number of devices.
  """
  sizes = defaults(config)
  if sizes["slices"] and slices > 1 and sizes["slices"] != slices:
    raise invalid("config.mesh.slices", sizes["slices"], f"0 or {slices}, the devices' slices")
  sizes["slices"] = sizes["slices"] or slices
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or 0 in sizes.values():
    raise invalid("config.mesh", sizes, "sizes >= 1, at most one of them -1")
  if devices % fixed or (not free and fixed != devices):
    raise invalid("config.mesh", sizes, f"sizes whose product is {devices}, the devices")
  for axis in free:
    sizes[axis] = devices // fixed
  return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """Makes the mesh that `config` describes.

  Args:
    config: sizes by axis; see `mesh_sizes`.
    devices: the devices to use; None means all.

  Raises:
    InputError: the sizes are not valid, or their product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  sizes = mesh_sizes(config, len(devices), slices)
  shape = tuple(sizes.values())
  grid = np.asarray(devices).reshape(shape)
  if devices[0].platform == "tpu":
    grid = _on_chips(shape, devices, slices)
  return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _on_chips(shape: tuple[int, ...], devices: list[jax.Device], slices: int) -> np.ndarray:
  """Arranges TPU devices so that neighbours along a mesh axis are neighbours in the torus."""
  if slices > 1:
    within, between = (1, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_batch(
    batch_size: int, seq_len: int, accumulate: int, mesh: Mesh | AbstractMesh
) -> None:
  """Checks that the mesh divides the batch of one accumulation step, and the rows' length.

  Raises:
    InputError: `seq_len` or `batch_size` is not a multiple of what the mesh requires.
  """
  if seq_len % mesh.shape[SEQUENCE_AXIS]:
    raise invalid(
        "config.data.seq_len", seq_len,
        f"a multiple of mesh.{SEQUENCE_AXIS} = {mesh.shape[SEQUENCE_AXIS]}",
    )
  parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if batch_size % (parts * accumulate):
    raise invalid(
        "config.train.batch_size", batch_size,
        f"a multiple of {' * '.join(f'mesh.{axis}' for axis in BATCH_AXES)} * train.accumulate = "
        f"{parts * accumulate}",
    )


def param_shardings(
    axes: dict[str, tuple[str | None, ...]], shapes: dict[str, tuple[int, ...]], mesh: Mesh
) -> dict[str, NamedSharding]:
  """Returns the sharding of each parameter.

  Args:
    axes: parameter name -> its logical axes; None for an axis that is never split.
    shapes: parameter name -> shape.
    mesh: the mesh.

  Raises:
    InputError: the size of a dimension is not a multiple of its mesh axis; the error names both.
  """
  shardings = {}
  for name, logical in axes.items():
    spec = tuple(PARAMETERS.get(axis) if axis else None for axis in logical)
    for size, axis in zip(shapes[name], spec, strict=True):
      if axis and size % mesh.shape[axis]:
        raise InputError(
            f"config.mesh.{axis} = {mesh.shape[axis]} is not valid: it does not divide a "
            f"dimension of {size} of {name}, shape {shapes[name]}"
        )
    shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
  return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays [B, T]."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, SEQUENCE_AXIS))


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays [B, ...] that have no axis of tokens."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(placed: NamedSharding, shape: tuple[int, int]) -> slice:
  """Returns the range of rows of a global [B, T] array that this process's devices hold."""
  parts = placed.addressable_devices_indices_map(shape).values()
  ranges = [part[0].indices(shape[0]) for part in parts if part is not None]
  return slice(min(low for low, _, _ in ranges), max(high for _, high, _ in ranges))


def put_rows(rows_BT: np.ndarray, rows: slice, batch_size: int, placed: NamedSharding) -> Array:
  """Makes a global array [batch_size, T] from the rows that each process has.

  Args:
    rows_BT: this process's rows, at their full length T.
    rows: their range in the global array, from `local_rows`.
    batch_size: the number of global rows.
    placed: the global array's sharding.
  """

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # A local device, which holds a part of every array.
    low, high, _ = index[0].indices(batch_size)
    return rows_BT[(slice(low - rows.start, high - rows.start), *index[1:])]

  return jax.make_array_from_callback((batch_size, *rows_BT.shape[1:]), placed, part)


@contextlib.contextmanager
def mesh_of(params: Params) -> Iterator[None]:
  """Makes the parameters' mesh the abstract mesh of programs traced inside; kernels look it up."""
  placed = next(iter(params.values())).sharding
  if not isinstance(placed, NamedSharding):
    yield
    return
  with jax.sharding.use_abstract_mesh(placed.mesh.abstract_mesh):
    yield


def constrain(x: Array, *axes: str | None) -> Array:
  """Constrains x to the sharding that `ACTIVATIONS` gives its logical axes on the current mesh.

  Without a mesh, or on one device, returns x unchanged. Parameters are split over `fsdp` as well
  as rows: unless activations are constrained to keep their rows, the compiler may leave a matrix
  split and move the activations instead.

  Args:
    x: an activation.
    *axes: its logical axes, one for each dimension; None for one that is not split.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  split = [ACTIVATIONS.get(axis) if axis else None for axis in axes]
  manual = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Manual}
  # Inside `sum_over_sequence`, x holds one device's tokens only: that mesh axis is manual.
  spec = PartitionSpec(*(None if axis in manual else axis for axis in split))
  return jax.lax.with_sharding_constraint(x, spec)


def constrain_tokens(x: Array, axis: str | None) -> Array:
  """Constrains x, [B, T, width] or one token's [B, width]; `axis` is the width's logical axis."""
  return constrain(x, "batch", *("length",) * (x.ndim - 2), axis)


def sum_over_sequence(
    function: Callable[..., PyTree], *, has_aux: bool = False
) -> Callable[..., PyTree]:
  """Wraps a function of a batch to run on each device's own tokens, and sums the results.

  Args:
    function: called as function(whole, batch), where `whole` is a tree that is the same on all
      devices of the mesh axis `sequence`, and `batch` a tree of [B, T], of which each of those
      devices holds its own tokens. Its results must add up over tokens. Inside it,
      `ops.sequence_parallel` passes states between the devices; everything else runs as on one
      device.
    has_aux: whether `function` returns a pair, of which only the first part is summed; the second
      is the same on all devices already.

  Returns:
    A function of the global (whole, batch). If the current mesh does not split the sequence, it
    calls `function` directly.
  """

  def summed(whole: PyTree, batch: PyTree) -> PyTree:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[SEQUENCE_AXIS] == 1:
      return function(whole, batch)

    def part(whole: PyTree, batch: PyTree) -> PyTree:
      if not has_aux:
        return jax.lax.psum(function(whole, batch), SEQUENCE_AXIS)
      sums, aux = function(whole, batch)
      return jax.lax.psum(sums, SEQUENCE_AXIS), aux

    return jax.shard_map(
        part, in_specs=(PartitionSpec(), PartitionSpec(None, SEQUENCE_AXIS)),
        out_specs=PartitionSpec(), axis_names={SEQUENCE_AXIS}, check_vma=False,
    )(whole, batch)

  return summed


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def describe_mesh(shape: Mapping[str, int]) -> str:
  """Returns a mesh's axes of more than one device, such as `data 4 x fsdp 2`, for messages."""
  split = [f"{axis} {size}" for axis, size in shape.items() if size > 1]
  return " x ".join(split) or "one device"
