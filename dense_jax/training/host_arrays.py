"""Arrays on their way between devices and the memory of their hosts, layer by layer.

Stacked arrays are split on the way to the hosts, and stacked on the way back, so that no device
holds a second copy of the state.
"""

import functools
from collections.abc import Callable, Sequence

import jax

from dense_jax.models.params import row_sharding, split_rows, stack_rows, stacked_sharding
from dense_jax.types import Params, PyTree

_HOST = "pinned_host"


def to_hosts(leaf: jax.Array, rows: int) -> Sequence[jax.Array]:
  """Splits an array [R, ...] into R arrays with the sharding of a row, in the hosts' memory."""
  return _splitter(rows, row_sharding(leaf.sharding).with_memory_kind(_HOST))(leaf)


def to_devices(leaves: Sequence[jax.Array]) -> jax.Array:
  """Inverts `to_hosts`."""
  placed = stacked_sharding(leaves[0].sharding)
  return _stacker(placed.with_memory_kind("device"))(leaves)


# Cached, so that each shape and sharding is compiled once instead of once per leaf.
@functools.cache
def _splitter(rows: int, placed: jax.sharding.Sharding) -> Callable[..., Sequence[jax.Array]]:
  return jax.jit(functools.partial(split_rows, rows=rows), out_shardings=placed)


@functools.cache
def _stacker(placed: jax.sharding.Sharding) -> Callable[..., jax.Array]:
  return jax.jit(stack_rows, out_shardings=placed)


def on_hosts(shapes: PyTree) -> PyTree:
  """Returns the same shapes and shardings in the memory of the devices' hosts."""
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(_HOST)
      ),
      shapes,
  )


def placed_on(params: Params, device: jax.sharding.Sharding) -> Params:
  """Returns the shapes of `params`, to be restored onto `device`."""
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), params
  )
