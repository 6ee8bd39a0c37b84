"""Shared parts of Mamba and Mamba-2: the short convolution, step sizes and their options."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import Config, ModelConfig, integer, invalid, number
from dense_jax.layers.linear import parameter, uniform
from dense_jax.ops import resolver
from dense_jax.ops.short_conv import short_conv, short_conv_step
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class SelectiveConfig(Config, key="config.model.mixer"):
  """Options that selective families share."""

  expand: int = integer(2, 1, help="E = expand * D: inner channels")
  state_size: int = integer(16, 1, help="N: state numbers of each inner channel")
  conv_width: int = integer(4, 2, help="W: taps of the short convolution")
  dt_min: float = number(
      1e-3, 0, open_low=True, help="lower end of dt at initialisation, which is log-uniform")
  dt_max: float = number(1e-1, 0, open_low=True, help="upper end of dt at initialisation")
  dt_floor: float = number(
      1e-4, 0, open_low=True, help="dt at initialisation is raised to at least this")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.dt_min > self.dt_max:
      raise invalid(
          "config.model.mixer.dt_min", self.dt_min, f"a number <= dt_max = {self.dt_max:g}"
      )

  def init_dt_bias(self, key: Array, shape: tuple[int, ...]) -> Array:
    """Draws softplus^-1 of step sizes that are log-uniform in [dt_min, dt_max], float32."""
    low, high = math.log(self.dt_min), math.log(self.dt_max)
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    dt = jnp.maximum(dt, self.dt_floor)
    return dt + jnp.log(-jnp.expm1(-dt))


class ShortConv(nnx.Module):
  """A short causal depthwise convolution, silu(conv(x)); its state is the last W - 1 inputs.

  Args:
    options: the family's options.
    width: E, the channels.
    axis: the logical axis of channels.
    config: the model.
    form: the form of the mixer's state, a key of `resolver.IMPLEMENTATIONS`.
  """

  def __init__(
      self, options: SelectiveConfig, width: int, axis: str | None, config: ModelConfig, form: str,
      rngs: nnx.Rngs,
  ) -> None:
    bound = 1 / math.sqrt(options.conv_width)
    self.kernel = parameter(rngs, (options.conv_width, width), (None, axis), uniform(bound))
    self.bias = parameter(rngs, (width,), (axis,), uniform(bound))
    self.convolve = resolver.convolution(form, config.implementation, split=axis is not None)
    self.tail_shape, self.dtype = (options.conv_width - 1, width), jnp.dtype(config.dtype)

  def __call__(
      self, x_E: Array, tokens: Segments | Token, tail_BWE: Array | None
  ) -> tuple[Array, Array]:
    """Returns the convolved input [..., E] and the next tail; a tail of None means zeros."""
    kernel_WE, bias_E = self.kernel[...], self.bias[...]
    if isinstance(tokens, Token):
      assert tail_BWE is not None
      return short_conv_step(x_E, kernel_WE, bias_E, tail_BWE)
    return short_conv(x_E, kernel_WE, bias_E, tokens, tail_BWE, self.convolve)

  def init_state(self, batch: int) -> Array:
    """Returns the tail before the first token, zeros [B, W - 1, E]."""
    return jnp.zeros((batch, *self.tail_shape), self.dtype)
