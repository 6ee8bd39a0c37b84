"""Kernels on a mesh: the compiler cannot split them, so that all axes have to be manual there."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dense_jax.ops import partition
from dense_jax.types import BATCH_AXES, SEQUENCE_AXIS, WIDTH_AXIS

AXES = (*BATCH_AXES, SEQUENCE_AXIS, WIDTH_AXIS)


def doubled(mesh, x_BTE, around=lambda function: function):
  """Returns the array, doubled by a kernel on the mesh, and the axes that are manual there."""
  manual = set()

  def kernel(x_BTE):
    manual.update(jax.sharding.get_abstract_mesh().manual_axes)
    return 2 * x_BTE

  spec = partition.by_row(None, WIDTH_AXIS)

  def run(x_BTE):
    return partition.over_mesh(kernel, lambda _: (spec,), spec, x_BTE)

  x_BTE = jax.device_put(x_BTE, NamedSharding(mesh, PartitionSpec()))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(around(run))(x_BTE), manual


@pytest.mark.parametrize("sizes", [(1, 2, 1, 1, 2), (2, 1, 2, 1, 1), (1, 1, 1, 1, 2)])
def test_axes_of_one_device_are_manual_too(sizes):
  """Else a TPU kernel is not lowered: it stands beside an axis that the compiler may split."""
  devices = np.asarray(jax.devices()[:math.prod(sizes)]).reshape(sizes)
  mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  x_BTE = jnp.arange(4.0 * 3 * 2).reshape(4, 3, 2)
  found, manual = doubled(mesh, x_BTE)
  assert manual == set(AXES)
  np.testing.assert_array_equal(found, 2 * x_BTE)


def test_an_axis_that_is_manual_stays_so():
  sizes = (1, 2, 1, 2, 1)
  devices = np.asarray(jax.devices()[:4]).reshape(sizes)
  mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  tokens = PartitionSpec(None, SEQUENCE_AXIS)

  def around(run):
    return jax.shard_map(
        run, in_specs=tokens, out_specs=tokens, axis_names={SEQUENCE_AXIS}, check_vma=False)

  x_BTE = jnp.arange(2.0 * 4 * 2).reshape(2, 4, 2)
  found, manual = doubled(mesh, x_BTE, around)
  assert manual == set(AXES)
  np.testing.assert_array_equal(found, 2 * x_BTE)


def test_without_a_mesh_the_kernel_runs_as_it_is():
  mesh = Mesh(np.asarray(jax.devices()[:1]).reshape((1,) * 5), AXES)
  found, manual = doubled(mesh, jnp.ones((1, 2, 3)))
  assert not manual
  np.testing.assert_array_equal(found, 2)
