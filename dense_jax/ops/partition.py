"""Runs Pallas kernels on several devices, each on its own rows and channels or heads.

The compiler cannot partition a kernel by itself. Rows are independent of each other, and so are
channels and heads, so a kernel needs no data from other devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dense_jax.ops.epilogue import Epilogue
from dense_jax.types import BATCH_AXES, WIDTH_AXIS, Array


def split(*axes: str | tuple[str, ...] | None) -> Any:
  """Returns a `PartitionSpec`, typed Any because it fills dataclass fields annotated as arrays."""
  return PartitionSpec(*axes)


def by_row(*rest: str | None) -> Any:
  """Returns the `PartitionSpec` of an array whose first axis is the batch."""
  return split(BATCH_AXES, *rest)


def unless_none(x: Array | None, spec: Any) -> Any:
  """Returns the spec of an array that may be None."""
  return None if x is None else spec


def of_epilogue(epilogue: Epilogue) -> Any:
  """Returns an epilogue with specs for its arrays, which are split by channels."""
  channels = by_row(None, WIDTH_AXIS)
  return dataclasses.replace(
      epilogue, skip=unless_none(epilogue.skip, split(WIDTH_AXIS)),
      x=unless_none(epilogue.x, channels), z=unless_none(epilogue.z, channels),
  )


def over_mesh(
    kernel: Callable[..., Any], specs: Callable[[int], tuple[Any, ...]], outputs: Any,
    *arguments: Any,
) -> Any:
  """Runs kernel(*arguments) on each device of the current mesh, if there is one.

  The mesh's sequence axis must already be manual here.

  Args:
    kernel: the function that runs kernels.
    specs: called with the size of the mesh's width axis; returns, for each argument, its tree with
      a `PartitionSpec` in place of each array.
    outputs: the result's tree, with specs in place of arrays.
    *arguments: trees of arrays.

  Returns:
    The kernel's result, of global arrays.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(*arguments)
  # All axes have to be manual around a TPU kernel, and an axis can become manual only once.
  axes = set(mesh.axis_names) - set(mesh.manual_axes)
  return jax.shard_map(
      kernel, in_specs=specs(mesh.shape[WIDTH_AXIS]), out_specs=outputs, axis_names=axes,
      check_vma=False,
  )(*arguments)
