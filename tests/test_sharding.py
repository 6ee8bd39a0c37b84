"""Host rows become global arrays, whatever the mesh splits."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dense_jax import sharding


@pytest.mark.parametrize("spec", [
    PartitionSpec(), PartitionSpec("rows"), PartitionSpec(None, "columns"),
    PartitionSpec("rows", "columns"), PartitionSpec(("rows", "columns")),
])
def test_rows_and_columns_arrive_where_they_belong(spec):
  mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("rows", "columns"))
  placed = NamedSharding(mesh, spec)
  rows_BT = np.arange(8 * 6).reshape(8, 6)
  rows = sharding.local_rows(placed, rows_BT.shape)
  assert rows == slice(0, 8)
  array = sharding.put_rows(rows_BT, rows, 8, placed)
  assert array.sharding == placed
  np.testing.assert_array_equal(array, rows_BT)


def test_a_process_needs_the_rows_of_its_devices_alone():
  mesh = Mesh(np.asarray(jax.devices()[4:]).reshape(2, 2), ("rows", "columns"))

  class SomeAreOurs(NamedSharding):
    """As seen from a process that has the last devices of the mesh."""

    def addressable_devices_indices_map(self, shape):
      everything = super().addressable_devices_indices_map(shape)
      return {device: everything[device] for device in jax.devices()[6:]}

  placed = SomeAreOurs(mesh, PartitionSpec("rows", "columns"))
  assert sharding.local_rows(placed, (8, 6)) == slice(4, 8)
  assert sharding.local_rows(SomeAreOurs(mesh, PartitionSpec()), (8, 6)) == slice(0, 8)
