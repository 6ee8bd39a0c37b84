"""The steps between a layer's read and its output projection, as data that a kernel takes over."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops.cpu import spread
from dense_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """A layer's read after its epilogue.

  Attributes:
    y: [..., E] or [..., H, P], like the read, in the epilogue's dtype.
    moments: the sum of y and the sum of its squares over each head, [..., H, 2] in float32, of the
      values before they were rounded to y's dtype; None if they were not asked for.
  """

  y: Array
  moments: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Epilogue:
  """The function (y + skip * x) * silu(z) of a read y, with what a norm needs to know of it.

  Computed in float32, and rounded once. A norm of the result multiplies each token or head by a
  number, which follows from the moments, so that the result is not read again to find it.

  Attributes:
    skip: the skip connection D of equation (2), float32, one number a head [H] if reads are
      [..., H, P], or one a channel [E] if they are [..., E]; None means 0.
    x: what `skip` multiplies, [..., E]; None without `skip`.
    z: the gate before its activation, [..., E]; None means no gate.
    dtype: the dtype of the result.
    moments: whether the moments of each head are wanted; reads are then [..., H, P].
  """

  skip: Array | None = None
  x: Array | None = None
  z: Array | None = None
  dtype: jnp.dtype = dataclasses.field(
      default=jnp.dtype("float32"), metadata={"static": True}
  )
  moments: bool = dataclasses.field(default=False, metadata={"static": True})

  def check(self, batch: int, time: int, width: int, skips: int) -> None:
    """Checks the shapes of its arrays, [B, T, E], and of `skip`, [skips]."""
    if self.skip is None:
      assert self.x is None, "x is what skip multiplies: expected both or neither"
    else:
      chex.assert_shape(self.skip, (skips,))
    for x_BTE in (self.x, self.z):
      if x_BTE is not None:
        chex.assert_shape(x_BTE, (batch, time, width))

  def __call__(self, y: Array) -> Output:
    """Applies it to a read, float32, [..., E] or [..., H, P]."""
    if self.skip is not None:
      assert self.x is not None
      x = self.x.reshape(y.shape).astype(jnp.float32)
      by_head = y.ndim > self.x.ndim
      y = y + spread(self.skip[:, None] if by_head else self.skip, x) * x
    if self.z is not None:
      y = y * jax.nn.silu(self.z.reshape(y.shape).astype(jnp.float32))
    moments = None
    if self.moments:
      moments = jnp.stack([jnp.sum(y, axis=-1), jnp.sum(y * y, axis=-1)], axis=-1)
    return Output(y.astype(self.dtype), moments)
