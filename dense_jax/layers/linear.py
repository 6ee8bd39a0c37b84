"""Linear maps, norms and initialisers.

Every parameter carries its logical axes (`axes`), which `dense_jax.sharding` maps to mesh axes.
Parameters are float32; a module computes in its input's dtype.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.ops import resolver
from dense_jax.ops.cpu import spread
from dense_jax.types import Array

Initializer = Callable[[Array, tuple[int, ...]], Array]
Axes = tuple[str | None, ...]


def normal(std: float) -> Initializer:
  """Makes a Gaussian initialiser with standard deviation `std`."""
  return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Initializer:
  """Makes an initialiser that is uniform in [-bound, bound]."""
  return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def fan_in_uniform(scale: float = 1.0) -> Initializer:
  """Makes a uniform initialiser with bound scale / sqrt(fan in), PyTorch's default for Linear."""
  return lambda key, shape: uniform(scale / math.sqrt(shape[0]))(key, shape)


def xavier_uniform(gain: float, *, parts: int = 1) -> Initializer:
  """Makes a uniform initialiser with bound gain * sqrt(6 / (fan in + fan out)).

  From Glorot and Bengio, 2010. The fan out is that of `parts` such matrices side by side.
  """

  def init(key: Array, shape: tuple[int, ...]) -> Array:
    return uniform(gain * math.sqrt(6 / (shape[0] + parts * shape[1])))(key, shape)

  return init


def zeros(key: Array, shape: tuple[int, ...]) -> Array:
  """Initialises with zeros."""
  del key
  return jnp.zeros(shape, jnp.float32)


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, init: Initializer
) -> nnx.Param[Array]:
  """Makes a float32 parameter with one logical axis (or None) for each dimension.

  Raises:
    ValueError: `axes` and `shape` differ in length.
  """
  if len(axes) != len(shape):
    raise ValueError(f"axes {axes} do not name the dimensions of shape {shape}")
  return nnx.Param(init(rngs.params(), shape), axes=axes)


class Linear(nnx.Module):
  """A linear map y = x W, with W `kernel` [in, out], without a bias."""

  def __init__(
      self, width_in: int, width_out: int, *, axes: Axes, init: Initializer, rngs: nnx.Rngs
  ) -> None:
    self.kernel = parameter(rngs, (width_in, width_out), axes, init)
    self.matmul = resolver.matmul_function()

  def __call__(self, x: Array) -> Array:
    """Maps [..., in] to [..., out], in x's dtype."""
    return self.matmul(x, self.kernel[...])

  def of_normed(self, norm: "RMSNorm", x: Array, squares_J: Array) -> Array:
    """Maps norm(x), given the sums of squares of x.

    Where the norm multiplies a token by one number, the map's result is multiplied by it instead,
    and the norm's scale is part of the matrix. So x is read once, by the map.

    Args:
      norm: the norm, over J groups.
      x: [..., in].
      squares_J: the sum of squares of each group, [..., J] in float32.
    """
    inverse_J = jax.lax.rsqrt(squares_J * (norm.groups / x.shape[-1]) + norm.epsilon)
    scale = norm.scale[...]
    if norm.groups > 1 or x.ndim < 3:  # One token of decoding is smaller than the matrix.
      x32 = x.astype(jnp.float32).reshape(*x.shape[:-1], norm.groups, -1) * inverse_J[..., None]
      return self((x32.reshape(x.shape) * spread(scale, x)).astype(x.dtype))
    return (self.of_scaled(scale, x).astype(jnp.float32) * inverse_J).astype(x.dtype)

  def of_scaled(self, scale: Array, x: Array) -> Array:
    """Maps scale * x, with a scale [in] of channels, float32.

    The scale is part of the matrix, or of x at one token of decoding, which is smaller.
    """
    if x.ndim < 3:
      return self((x.astype(jnp.float32) * spread(scale, x)).astype(x.dtype))
    return self.matmul(x, scale[:, None] * self.kernel[...])


class RMSNorm(nnx.Module):
  """Root-mean-square norm (arXiv 1910.07467) over the last axis, with float32 statistics.

  With `groups` above 1, each of that many equal parts of the axis is normalised by itself.
  """

  def __init__(
      self, width: int, *, axis: str | None, epsilon: float, groups: int = 1, rngs: nnx.Rngs
  ) -> None:
    self.scale = parameter(rngs, (width,), (axis,), lambda _, shape: jnp.ones(shape))
    self.epsilon, self.groups = epsilon, groups
    self.split = resolver.groups_function()

  def __call__(self, x: Array) -> Array:
    """Maps [..., width] to the same shape, in x's dtype."""
    x32 = self.split(x.astype(jnp.float32), self.groups)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
    return ((x32 * inverse).reshape(x.shape) * spread(self.scale[...], x)).astype(x.dtype)
