"""Mamba-1 (arXiv 2312.00752): a selective diagonal state space model.

    x, z = W_in u, W_gate u         x = silu(conv(x))
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

from dense_jax.batch import Segments
from dense_jax.config import ModelConfig, integer
from dense_jax.layers.dense_connection import DenseConnection, Shared
from dense_jax.layers.linear import Linear, fan_in_uniform, parameter
from dense_jax.layers.mixer import MixerOutput
from dense_jax.layers.selective import SelectiveConfig, ShortConv
from dense_jax.ops import dispatch, reference
from dense_jax.ops.matmul import spread
from dense_jax.ops.selective_scan import StepSizes
from dense_jax.ops.state_sequence import StateSequence
from dense_jax.ops.states import scan_diagonal
from dense_jax.ops.token_states import DiagonalState
from dense_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class MambaConfig(SelectiveConfig):
  """Mamba's own options, beside those of `SelectiveConfig`."""

  dt_rank: int = integer(0, 0, help="rank of the map to dt; 0 means ceil(D / 16)")


class Mamba(nnx.Module):
  """The mixer. Its state: {"conv": the convolution's tail, "h": h_BNE in float32}."""

  def __init__(self, config: ModelConfig, *, sources: int, rngs: nnx.Rngs) -> None:
    options: MambaConfig = config.mixer
    self.width = options.expand * config.width
    self.state_size = options.state_size
    self.dt_rank = options.dt_rank or math.ceil(config.width / 16)
    self.implementation = dispatch.resolve("diagonal", config.implementation)
    self.chunk = config.chunk

    def widen() -> Linear:
      return Linear(
          config.width, self.width, axes=("embed", "inner"), init=fan_in_uniform(), rngs=rngs
      )

    # Apart, so that each device of a mesh has the same channels of both.
    self.in_proj, self.gate_proj = widen(), widen()
    self.conv = ShortConv(options, self.width, "inner", config.dtype, rngs)
    self.x_proj = Linear(
        self.width, self.dt_rank + 2 * self.state_size,
        axes=("inner", None), init=fan_in_uniform(), rngs=rngs,
    )
    self.dt_proj = Linear(
        self.dt_rank, self.width, axes=(None, "inner"), init=fan_in_uniform(), rngs=rngs
    )
    self.dt_bias = parameter(rngs, (self.width,), ("inner",), options.init_dt_bias)
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

  def _selected(self, x: Array) -> tuple[StepSizes, Array, Array]:
    """dt, B and C of the convolved input, [..., E]."""
    low, b, c = jnp.split(
        self.x_proj(x), [self.dt_rank, self.dt_rank + self.state_size], axis=-1
    )
    return StepSizes(low, self.dt_proj.kernel[...], self.dt_bias[...]), b, c

  def _output(self, y: Array, x: Array, z: Array) -> Array:
    y = y + spread(self.d[...], x) * x.astype(jnp.float32)
    return self.out_proj(y.astype(z.dtype) * jax.nn.silu(z))

  def __call__(
      self, x_BTD: Array, segments: Segments, state: PyTree | None, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`."""
    z_BTE = self.gate_proj(x_BTD)
    x_BTE, conv = self.conv(self.in_proj(x_BTD), segments, state and state["conv"])
    dt, b_BTN, c_BTN = self._selected(x_BTE)
    own = {"b": b_BTN, "x": x_BTE}
    fused, inputs = self.dense.fuse_inputs(x_BTD, own, shallow)
    states: StateSequence = scan_diagonal(
        dt, -jnp.exp(self.a_log[...]), fused["x"], fused["b"], segments, state and state["h"],
        implementation=self.implementation, chunk=self.chunk,
    )
    y_BTE, states, shared = self.dense.read(x_BTD, c_BTN, states, shallow)
    y_BTD = self._output(y_BTE, x_BTE, z_BTE)
    return MixerOutput(y_BTD, {"conv": conv, "h": states.final()}, shared, inputs)

  def step(
      self, x_BD: Array, position_B: Array, state: PyTree, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`."""
    del position_B
    z_BE = self.gate_proj(x_BD)
    x_BE, conv = self.conv.step(self.in_proj(x_BD), state["conv"])
    dt, b_BN, c_BN = self._selected(x_BE)
    own = {"b": b_BN, "x": x_BE}
    fused, inputs = self.dense.fuse_inputs(x_BD, own, shallow)
    h_BNE = reference.diagonal_step(
        -jnp.exp(self.a_log[...])[None], state["h"], dt.dt(), fused["x"], fused["b"]
    )
    y_BE, _, shared = self.dense.read(x_BD, c_BN, DiagonalState(h_BNE), shallow)
    y_BD = self._output(y_BE, x_BE, z_BE)
    return MixerOutput(y_BD, {"conv": conv, "h": h_BNE}, shared, inputs)

  def init_state(self, batch: int) -> PyTree:
    """See `Mixer`."""
    return {
        "conv": self.conv.init_state(batch),
        "h": jnp.zeros((batch, self.state_size, self.width), jnp.float32),
    }
