"""Runs Pallas kernels on several devices, each on its own rows and channels or heads.

The compiler cannot partition a kernel by itself. Rows are independent of each other, and so are
channels and heads, so a kernel needs no data from other devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dense_jax.types import BATCH_AXES, WIDTH_AXIS, Array


def split(*axes: str | tuple[str, ...] | None) -> Any:
  """Returns a `PartitionSpec`, typed Any because it fills dataclass fields annotated as arrays."""
  return PartitionSpec(*axes)


def by_row(*rest: str | None) -> Any:
  """Returns the `PartitionSpec` of an array whose first axis is the batch."""
  return split(BATCH_AXES, *rest)


def over_mesh(
    kernel: Callable[..., tuple[Array, Array]],
    specs: Callable[[Any, int], Any],
    outputs: tuple[Any, Any],
    sources: Sequence[Any],
    resets_BT: Array | None,
) -> tuple[Array, Array]:
  """Runs kernel(sources, resets_BT) on each device of the current mesh, if there is one.

  The mesh's sequence axis must already be manual here.

  Args:
    kernel: returns y and the final state.
    specs: called as specs(source, size of the width axis); returns the source with a
      `PartitionSpec` in place of each array.
    outputs: the specs of y and of the final state.
    sources: the recurrences that the kernel reads.
    resets_BT: bool, true where the state is cleared before the token; None means never.

  Returns:
    y and the final state, global arrays.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(sources, resets_BT)
  in_specs = [specs(source, mesh.shape[WIDTH_AXIS]) for source in sources]
  return jax.shard_map(
      kernel, in_specs=(in_specs, by_row()), out_specs=outputs,
      axis_names={*BATCH_AXES, WIDTH_AXIS}, check_vma=False,
  )(sources, resets_BT)
