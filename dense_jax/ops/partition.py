"""Kernels on several devices: each runs on the rows, channels and heads that a device has.

The compiler splits no kernel by itself. Rows are independent of each other, and so are
channels and heads: a kernel needs nothing of other devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dense_jax.types import BATCH_AXES, WIDTH_AXIS, Array


def split(*axes: str | tuple[str, ...] | None) -> Any:
  """Returns a specification; it stands where dataclasses are annotated with arrays."""
  return PartitionSpec(*axes)


def by_row(*rest: str | None) -> Any:
  """Returns the specification of an array whose first axis is that of rows."""
  return split(BATCH_AXES, *rest)


def over_mesh(
    kernel: Callable[..., tuple[Array, Array]],
    specs: Callable[[Any, int], Any],
    outputs: tuple[Any, Any],
    sources: Sequence[Any],
    resets_BT: Array | None,
) -> tuple[Array, Array]:
  """Runs kernel(sources, resets_BT) on each device of the mesh in use, if there is one.

  The mesh's sequence axis must already be manual here.

  Args:
    kernel: gives y and the final state.
    specs: a source and the width axis' size -> the source with specifications for arrays.
    outputs: the specifications of y and of the final state.
    sources: the recurrences that the kernel reads.
    resets_BT: bool, clears the state before a token; None never does.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(sources, resets_BT)
  in_specs = [specs(source, mesh.shape[WIDTH_AXIS]) for source in sources]
  return jax.shard_map(
      kernel, in_specs=(in_specs, by_row()), out_specs=outputs,
      axis_names={*BATCH_AXES, WIDTH_AXIS}, check_vma=False,
  )(sources, resets_BT)
