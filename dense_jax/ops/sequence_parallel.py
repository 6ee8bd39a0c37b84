"""Rows whose tokens are spread over devices: each scans its own, states pass between them.

Inside `jax.shard_map` over the mesh axis `sequence` a device has consecutive tokens of each
row, and every operation is local but two: a recurrence's state before the device's first
token, and a short convolution's last inputs. A linear recurrence takes a device's tokens as one
step, h -> A h + u, so that the states before all devices are a prefix sum in log2(devices)
exchanges of (A, u) with a neighbour; bytes do not depend on T. Documents need no more: a device
in which one begins has A = 0. Outside such a map these functions change nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from dense_jax.errors import InputError
from dense_jax.types import SEQUENCE_AXIS, Array, PyTree

Join = Callable[[tuple[Array, Array], tuple[Array, Array], int], tuple[Array, Array]]
"""Composes affine maps h -> A h + u of two runs of tokens, the left one first.

Its last argument is how many devices the right run spans."""


def shards() -> int:
  """How many devices share a row's tokens."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or SEQUENCE_AXIS not in mesh.axis_names:
    return 1
  manual = mesh.axis_types[mesh.axis_names.index(SEQUENCE_AXIS)] == AxisType.Manual
  return mesh.shape[SEQUENCE_AXIS] if manual else 1


def is_first() -> Array:
  """bool: this device has the rows' first tokens."""
  return jax.lax.axis_index(SEQUENCE_AXIS) == 0


def from_left(x: PyTree, distance: int = 1) -> PyTree:
  """x of the device so many places to the left; zero where there is none."""
  pairs = [(source, source + distance) for source in range(shards() - distance)]
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, SEQUENCE_AXIS, pairs), x)


def mean_over_shards(x: Array) -> Array:
  """The mean of x over the devices that share rows' tokens, the same on all of them."""
  return jax.lax.pmean(x, SEQUENCE_AXIS) if shards() > 1 else x


def before_shard(own: tuple[Array, Array], initial: Array, join: Join) -> Array:
  """Computes the state before this device's tokens.

  Args:
    own: (A, u) of the tokens; on the first device u is the state after them.
    initial: the state before the first device's tokens.
    join: composes two runs.
  """
  run, distance = from_left(own), 1
  # The zeros that the first devices get stand for no tokens: nothing is to their left.
  while distance < shards() - 1:
    run, distance = join(from_left(run, distance), run, distance), 2 * distance
  return jnp.where(is_first(), initial, run[1])


def elementwise(
    left: tuple[Array, Array], right: tuple[Array, Array], devices: int
) -> tuple[Array, Array]:
  """Joins runs whose A multiplies each number of a state."""
  del devices
  return left[0] * right[0], right[0] * left[1] + right[1]


def on_first_shard(initial: Array) -> Array:
  """The rows' first state on the first device, and zero on all others."""
  return jnp.where(is_first(), initial, 0.0)


def unless_reset(decay: Array, resets_BT: Array | None) -> Array:
  """A of tokens that may clear the state; [B, ...]."""
  if resets_BT is None:
    return decay
  cleared_B = jnp.any(resets_BT, axis=1).reshape(-1, *(1,) * (decay.ndim - 1))
  return jnp.where(cleared_B, 0.0, decay)


def tail_before(x_BTE: Array, resets_BT: Array | None, tail_BWE: Array) -> Array:
  """The inputs before this device's first, of the document that goes on there.

  Args:
    x_BTE: this device's inputs, at least as many as the tail is long.
    resets_BT: bool, where documents begin; None is nowhere.
    tail_BWE: the inputs before the rows' first.

  Raises:
    InputError: a device has fewer tokens than that.
  """
  time, taps = x_BTE.shape[1], tail_BWE.shape[1]
  if time < taps:
    raise InputError(
        f"config.mesh.{SEQUENCE_AXIS} = {shards()} is not valid: it leaves a device {time} of a "
        f"row's tokens; expected at least {taps}, conv_width - 1"
    )
  last_BWE = x_BTE[:, time - taps :]
  if resets_BT is not None:
    begun_BW = jnp.cumsum(resets_BT[:, time - taps :], axis=1, dtype=jnp.int32)
    same_BW = begun_BW == begun_BW[:, -1:]
    last_BWE = jnp.where(same_BW[..., None], last_BWE, 0)
  return jnp.where(is_first(), tail_BWE.astype(x_BTE.dtype), from_left(last_BWE))
