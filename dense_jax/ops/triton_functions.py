"""Functions that kernels for GPUs compute by operations that Pallas's Triton back end has."""

import jax.numpy as jnp

from dense_jax.types import Array


def sigmoid(x: Array) -> Array:
  """Computes the logistic function."""
  return 1 / (1 + jnp.exp(-x))


def silu(x: Array) -> Array:
  """Computes x sigmoid(x)."""
  return x * sigmoid(x)


def silu_slope(x: Array) -> Array:
  """Computes the derivative of silu."""
  half = sigmoid(x)
  return half * (1 + x * (1 - half))


def softplus(x: Array) -> Array:
  """Computes log(1 + exp(x)), which does not overflow."""
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
