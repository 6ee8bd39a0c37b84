"""The kernels on several devices: each runs on the rows, channels and heads that a device has.

The compiler splits no kernel by itself. Rows are independent of each other, and so are
channels and heads: a kernel needs nothing of other devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dense_jax.errors import InputError
from dense_jax.ops.pallas.chunked_linear import Matrix, matrix_reads
from dense_jax.ops.pallas.selective_scan import Diagonal, selective_reads
from dense_jax.types import BATCH_AXES, WIDTH_AXIS, Array


def _split(*axes: str | tuple[str, ...] | None) -> Any:
  """A specification; it stands where the dataclasses are annotated with arrays."""
  return PartitionSpec(*axes)


def _by_row(*rest: str | None) -> Any:
  return _split(BATCH_AXES, *rest)


def _over_mesh(
    kernel: Callable[..., tuple[Array, Array]],
    specs: Callable[[Any, int], Any],
    read: Any,
    final: Any,
    sources: Sequence[Any],
    resets_BT: Array | None,
) -> tuple[Array, Array]:
  """kernel(sources, resets_BT), on each device of the mesh that is in use, if there is one."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(sources, resets_BT)
  # Over `sequence` each device is by itself already, or this is no place for a kernel.
  split = [specs(source, mesh.shape[WIDTH_AXIS]) for source in sources]
  return jax.shard_map(
      kernel, in_specs=(split, _by_row()), out_specs=(read, final),
      axis_names={*BATCH_AXES, WIDTH_AXIS}, check_vma=False,
  )(sources, resets_BT)


def _diagonal_specs(source: Diagonal, width: int) -> Diagonal:
  del width
  channels = _by_row(None, WIDTH_AXIS)
  return dataclasses.replace(
      source, dt_BTE=channels, a_NE=_split(None, WIDTH_AXIS), x_BTE=channels,
      b_BTN=_by_row(), c_BTN=_by_row(), initial_BNE=channels,
      gate_BTE=None if source.gate_BTE is None else channels,
  )


def _matrix_specs(source: Matrix, width: int) -> Matrix:
  groups = source.k_BTJN.shape[2]
  if groups > 1 and groups % width:
    raise InputError(
        f"config.mesh.{WIDTH_AXIS} = {width} is not valid: with implementation=pallas it has to "
        f"divide the {groups} groups of heads that share keys"
    )
  heads, keys = _by_row(None, WIDTH_AXIS), _by_row(None, WIDTH_AXIS if groups > 1 else None)
  shared = source.log_decay_BTH.shape[0] == 1
  return dataclasses.replace(
      source, q_BTJN=keys, k_BTJN=keys, v_BTHP=heads, initial_BHPN=_by_row(WIDTH_AXIS),
      log_decay_BTH=_split(None, None, WIDTH_AXIS) if shared else heads,
      gate_BTHP=None if source.gate_BTHP is None else heads,
  )


def read_diagonal(
    sources: Sequence[Diagonal], resets_BT: Array | None, *, chunk: int, interpret: bool
) -> tuple[Array, Array]:
  """`selective_reads` on the mesh in use."""
  kernel = functools.partial(selective_reads, chunk=chunk, interpret=interpret)
  channels = _by_row(None, WIDTH_AXIS)
  return _over_mesh(kernel, _diagonal_specs, channels, channels, sources, resets_BT)


def read_matrix(
    sources: Sequence[Matrix], resets_BT: Array | None, *, chunk: int, interpret: bool
) -> tuple[Array, Array]:
  """`matrix_reads` on the mesh in use.

  Raises:
    InputError: the mesh splits a group of heads that share keys.
  """
  kernel = functools.partial(matrix_reads, chunk=chunk, interpret=interpret)
  return _over_mesh(
      kernel, _matrix_specs, _by_row(None, WIDTH_AXIS), _by_row(WIDTH_AXIS), sources, resets_BT
  )
