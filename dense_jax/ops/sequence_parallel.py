"""Sequence parallelism: each device scans its own tokens of a row, and devices exchange states.

Inside `jax.shard_map` over the mesh axis `sequence`, a device holds consecutive tokens of each
row. All operations are local except two: a recurrence needs the state before the device's first
token, and a short convolution the inputs before it. A linear recurrence maps the state before a
device's tokens to the state after them by one affine step, h -> A h + u. So the states before all
devices are a prefix scan of (A, u), in log2(devices) exchanges whose size does not depend on T.
Documents need nothing more: a device in which one begins has A = 0. Without such a `shard_map`,
`shards()` is 1 and callers skip the exchange.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from dense_jax.errors import InputError
from dense_jax.ops import affine
from dense_jax.types import SEQUENCE_AXIS, Array, PyTree

Join = Callable[[tuple[Array, Array], tuple[Array, Array], int], tuple[Array, Array]]
"""Composes affine maps h -> A h + u, the left one first.

The last argument is the number of devices whose tokens the right map covers."""


def shards() -> int:
  """Returns the number of devices that a row's tokens are split over; 1 outside `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or SEQUENCE_AXIS not in mesh.axis_names:
    return 1
  manual = mesh.axis_types[mesh.axis_names.index(SEQUENCE_AXIS)] == AxisType.Manual
  return mesh.shape[SEQUENCE_AXIS] if manual else 1


def is_first() -> Array:
  """Returns a bool scalar, true on the device that holds the rows' first tokens."""
  return jax.lax.axis_index(SEQUENCE_AXIS) == 0


def from_left(x: PyTree, distance: int = 1) -> PyTree:
  """Returns x of the device `distance` places to the left, or zeros if there is none."""
  pairs = [(source, source + distance) for source in range(shards() - distance)]
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, SEQUENCE_AXIS, pairs), x)


def mean_over_shards(x: Array) -> Array:
  """Returns the mean of x over the devices that a row is split over; the same on all of them."""
  return jax.lax.pmean(x, SEQUENCE_AXIS) if shards() > 1 else x


def before_shard(own: tuple[Array, Array], initial: Array, join: Join) -> Array:
  """Computes the state before this device's tokens.

  Args:
    own: (A, u) of this device's tokens; on the first device, u is the state after them.
    initial: the state before the first device's tokens.
    join: composes the maps of adjacent tokens.
  """
  run, distance = from_left(own), 1
  # The first devices receive zeros, and nothing to their left contributes to their states.
  while distance < shards() - 1:
    run, distance = join(from_left(run, distance), run, distance), 2 * distance
  return jnp.where(is_first(), initial, run[1])


def elementwise(
    left: tuple[Array, Array], right: tuple[Array, Array], devices: int
) -> tuple[Array, Array]:
  """Composes maps whose A multiplies the state elementwise; see `Join`."""
  del devices
  return affine.compose(left, right)


def on_first_shard(initial: Array) -> Array:
  """Returns the rows' initial state on the first device, and zeros on all others."""
  return jnp.where(is_first(), initial, 0.0)


def unless_reset(decay: Array, resets_BT: Array | None) -> Array:
  """Returns the decay A [B, ...], or zero in rows in which a token clears the state."""
  if resets_BT is None:
    return decay
  cleared_B = jnp.any(resets_BT, axis=1).reshape(-1, *(1,) * (decay.ndim - 1))
  return jnp.where(cleared_B, 0.0, decay)


def tail_before(x_BTE: Array, resets_BT: Array | None, tail_BWE: Array) -> Array:
  """Returns the short convolution's inputs before this device's first token.

  Args:
    x_BTE: this device's inputs, at least W - 1 tokens.
    resets_BT: bool, true at the first token of each document; None means that none begins.
    tail_BWE: the W - 1 inputs before the rows' first token.

  Returns:
    The W - 1 inputs before this device's tokens, zero where they belong to another document than
    the last of them; x's dtype.

  Raises:
    InputError: a device has fewer than W - 1 tokens of a row.
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
