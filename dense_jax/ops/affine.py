"""Affine maps h -> A h + u whose A multiplies the state elementwise."""

import jax.numpy as jnp

from dense_jax.types import Array


def compose(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
  """Composes maps (A, u), the left one first; A may lack the last axes of u."""
  (a_left, u_left), (a_right, u_right) = left, right
  factor = jnp.expand_dims(a_right, range(a_right.ndim, u_left.ndim))
  return a_left * a_right, factor * u_left + u_right
