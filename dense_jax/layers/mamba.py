"""Mamba-1 (arXiv 2312.00752): a selective diagonal state space model.

    x, z = split(W_in u)            x = silu(conv(x))
    dt, B, C = split(W_x x)         dt = softplus(W_dt dt + b_dt)
    h_t = exp(dt A) h_{t-1} + dt x B,     y = C h + D x,     out = W_out (y silu(z))

Initialisation as published (section 3.6 and the released code): A = -(1 .. N) in each
channel (S4D-Real), softplus(b_dt) log-uniform in [dt_min, dt_max], D = 1, and the output
projection divided by sqrt(L).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig, integer, invalid, number
from dense_jax.layers.dense_connection import DenseConnection, Shared
from dense_jax.layers.linear import Linear, fan_in_uniform, parameter, uniform
from dense_jax.layers.mixer import MixerOutput
from dense_jax.ops import dispatch, reference
from dense_jax.ops.short_conv import short_conv, short_conv_step
from dense_jax.ops.states import DiagonalState, scan_diagonal
from dense_jax.types import Array, PyTree, Segments


@dataclasses.dataclass(frozen=True)
class MambaConfig:
  """Mamba's own options.

  Attributes:
    expand: E = expand * D.
    state_size: N.
    conv_width: W, taps of the short convolution.
    dt_rank: rank of the map to dt; 0 takes ceil(D / 16).
    dt_min, dt_max, dt_floor: the range of dt at initialisation.
  """

  expand: int = integer(2, 1)
  state_size: int = integer(16, 1)
  conv_width: int = integer(4, 2)
  dt_rank: int = integer(0, 0)
  dt_min: float = number(1e-3, 0, open_low=True)
  dt_max: float = number(1e-1, 0, open_low=True)
  dt_floor: float = number(1e-4, 0, open_low=True)

  def __post_init__(self) -> None:
    if self.dt_min > self.dt_max:
      raise invalid(
          "config.model.mixer.dt_min", self.dt_min, f"a number <= dt_max = {self.dt_max:g}"
      )


def _dt_bias(config: MambaConfig, key: Array, shape: tuple[int, ...]) -> Array:
  """softplus^-1 of step sizes that are log-uniform in [dt_min, dt_max]."""
  low, high = math.log(config.dt_min), math.log(config.dt_max)
  dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
  dt = jnp.maximum(dt, config.dt_floor)
  return dt + jnp.log(-jnp.expm1(-dt))


class Mamba(nnx.Module):
  """The mixer. Its state: {"conv": the convolution's tail, "h": h_BNE in float32}."""

  def __init__(self, config: ModelConfig, *, sources: int, rngs: nnx.Rngs) -> None:
    options: MambaConfig = config.mixer
    self.width = options.expand * config.width
    self.state_size = options.state_size
    self.conv_width = options.conv_width
    self.dt_rank = options.dt_rank or math.ceil(config.width / 16)
    self.dtype = jnp.dtype(config.dtype)
    self.implementation = dispatch.resolve("diagonal", config.implementation)
    self.chunk = config.chunk

    self.in_proj = Linear(
        config.width, 2 * self.width, axes=("embed", "inner"), init=fan_in_uniform(), rngs=rngs
    )
    bound = 1 / math.sqrt(self.conv_width)
    self.conv_kernel = parameter(
        rngs, (self.conv_width, self.width), (None, "inner"), uniform(bound)
    )
    self.conv_bias = parameter(rngs, (self.width,), ("inner",), uniform(bound))
    self.x_proj = Linear(
        self.width, self.dt_rank + 2 * self.state_size,
        axes=("inner", None), init=fan_in_uniform(), rngs=rngs,
    )
    self.dt_proj = Linear(
        self.dt_rank, self.width, axes=(None, "inner"), init=fan_in_uniform(), rngs=rngs
    )
    self.dt_bias = parameter(
        rngs, (self.width,), ("inner",), lambda key, shape: _dt_bias(options, key, shape)
    )
    self.a_log = parameter(
        rngs, (self.state_size, self.width), (None, "inner"),
        lambda _, shape: jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[0] + 1))[:, None], shape),
    )
    self.d = parameter(rngs, (self.width,), ("inner",), lambda _, shape: jnp.ones(shape))
    self.out_proj = Linear(
        self.width, config.width, axes=("inner", "embed"),
        init=fan_in_uniform(1 / math.sqrt(config.layers)), rngs=rngs,
    )
    self.dense = DenseConnection(
        config, sources=sources, rngs=rngs, query=(self.state_size,), channels=self.width,
        inputs={"b": (self.state_size, None), "x": (self.width, "inner")},
    )

  def _selected(self, x: Array) -> tuple[Array, Array, Array]:
    """dt (float32), B and C of the convolved input, [..., E]."""
    low, b, c = jnp.split(
        self.x_proj(x), [self.dt_rank, self.dt_rank + self.state_size], axis=-1
    )
    bias = self.dt_bias[...].reshape((1,) * (x.ndim - 1) + (-1,))
    return jax.nn.softplus(self.dt_proj(low).astype(jnp.float32) + bias), b, c

  def _output(self, y: Array, x: Array, z: Array) -> Array:
    d = self.d[...].reshape((1,) * (x.ndim - 1) + (-1,))
    y = y + d * x.astype(jnp.float32)
    return self.out_proj(y.astype(z.dtype) * jax.nn.silu(z))

  def __call__(
      self, x_BTD: Array, segments: Segments, state: PyTree | None, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`."""
    state = state or self.init_state(x_BTD.shape[0])
    x_BTE, z_BTE = jnp.split(self.in_proj(x_BTD), 2, axis=-1)
    x_BTE, conv = short_conv(
        x_BTE, self.conv_kernel[...], self.conv_bias[...], segments, state["conv"]
    )
    x_BTE = jax.nn.silu(x_BTE)
    dt_BTE, b_BTN, c_BTN = self._selected(x_BTE)
    own = {"b": b_BTN, "x": x_BTE}
    fused, inputs = self.dense.fuse_inputs(x_BTD, own, shallow)
    y_BTE, states = scan_diagonal(
        dt_BTE, -jnp.exp(self.a_log[...]), fused["x"], fused["b"], self.dense.own_query(c_BTN),
        segments, state["h"],
        implementation=self.implementation, chunk=self.chunk,
    )
    y_BTE, shared = self.dense.fuse_reads(x_BTD, y_BTE, c_BTN, states, shallow)
    y_BTD = self._output(y_BTE, x_BTE, z_BTE)
    return MixerOutput(y_BTD, {"conv": conv, "h": states.final()}, shared, inputs)

  def step(
      self, x_BD: Array, position_B: Array, state: PyTree, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`."""
    del position_B
    x_BE, z_BE = jnp.split(self.in_proj(x_BD), 2, axis=-1)
    x_BE, conv = short_conv_step(
        x_BE, self.conv_kernel[...], self.conv_bias[...], state["conv"]
    )
    x_BE = jax.nn.silu(x_BE)
    dt_BE, b_BN, c_BN = self._selected(x_BE)
    own = {"b": b_BN, "x": x_BE}
    fused, inputs = self.dense.fuse_inputs(x_BD, own, shallow)
    h_BNE = reference.diagonal_step(
        state["h"], dt_BE, -jnp.exp(self.a_log[...]), fused["x"], fused["b"]
    )
    states = DiagonalState(h_BNE)
    own_BE = states.read(self.dense.own_query(c_BN))
    y_BE, shared = self.dense.fuse_reads(x_BD, own_BE, c_BN, states, shallow)
    y_BD = self._output(y_BE, x_BE, z_BE)
    return MixerOutput(y_BD, {"conv": conv, "h": h_BNE}, shared, inputs)

  def init_state(self, batch: int) -> PyTree:
    """See `Mixer`."""
    return {
        "conv": jnp.zeros((batch, self.conv_width - 1, self.width), self.dtype),
        "h": jnp.zeros((batch, self.state_size, self.width), jnp.float32),
    }
