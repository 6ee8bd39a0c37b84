"""Mamba-1 (arXiv 2312.00752): a selective diagonal state space model.

    x, z = W_in u, W_gate u         x = silu(conv(x))
    dt, B, C = split(W_x x)         dt = softplus(W_dt dt + b_dt)
    h_t = exp(dt A) h_{t-1} + dt x B,     y = C h + D x,     out = W_out (y silu(z))

Initialisation as published (section 3.6 and the released code): A = -(1 .. N) in each
channel (S4D-Real), softplus(b_dt) log-uniform in [dt_min, dt_max], D = 1, and an output
projection that is divided by sqrt(L).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import ModelConfig, integer
from dense_jax.layers.dense import make_connection
from dense_jax.layers.dense.connection import Shared
from dense_jax.layers.linear import Linear, fan_in_uniform, parameter
from dense_jax.layers.metrics import record_memory
from dense_jax.layers.mixer import MixerOutput
from dense_jax.layers.selective import SelectiveConfig, ShortConv
from dense_jax.ops import resolver
from dense_jax.ops.diagonal.step_sizes import StepSizes
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.recurrence import Sizes
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class MambaConfig(SelectiveConfig):
  """Mamba's own options, beside those of `SelectiveConfig`."""

  dt_rank: int = integer(0, 0, help="rank of the map to dt; 0 means ceil(D / 16)")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState:
  """The convolution's last W - 1 inputs, in the model's dtype, and h_BNE, float32."""

  tail_BWE: Array
  h_BNE: Array


class Mamba(nnx.Module):
  """Mamba's mixer; see `Mixer`."""

  form: ClassVar[str] = "diagonal"

  def __init__(self, config: ModelConfig, *, sources: int, rngs: nnx.Rngs) -> None:
    options: MambaConfig = config.mixer
    self.width = options.expand * config.width
    self.state_size = options.state_size
    self.dt_rank = options.dt_rank or math.ceil(config.width / 16)
    self.recurrence = resolver.diagonal_form(config.implementation, config.chunk)

    def widen() -> Linear:
      return Linear(
          config.width, self.width, axes=("embed", "inner"), init=fan_in_uniform(), rngs=rngs
      )

    # Two maps, so that each device of a mesh has the same channels of both.
    self.in_proj, self.gate_proj = widen(), widen()
    self.conv = ShortConv(options, self.width, "inner", config, self.form, rngs)
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
    self.dense = make_connection(
        config, form=self.form, sources=sources, rngs=rngs,
        query=(self.state_size,), channels=self.width,
        inputs={"b": (self.state_size, None), "x": (self.width, "inner")},
    )

  @property
  def sizes(self) -> Sizes:
    """The sizes of the recurrence's states."""
    return Sizes(1, 1, self.width, self.state_size)

  def _selected(self, x_E: Array) -> tuple[StepSizes, Array, Array]:
    """Returns dt, B and C, made from the convolved input."""
    low_R, b_N, c_N = jnp.split(
        self.x_proj(x_E), [self.dt_rank, self.dt_rank + self.state_size], axis=-1
    )
    dt = StepSizes(
        low_R, self.dt_proj.kernel[...], self.dt_bias[...], matmul=self.dt_proj.matmul
    )
    return dt, b_N, c_N

  def __call__(
      self, x_D: Array, tokens: Segments | Token, state: MambaState | None,
      shallow: Sequence[Shared],
  ) -> MixerOutput:
    """See `Mixer`."""
    tail_BWE, h_BNE = (None, None) if state is None else (state.tail_BWE, state.h_BNE)
    z_E = self.gate_proj(x_D)
    x_E, tail_BWE = self.conv(self.in_proj(x_D), tokens, tail_BWE)
    dt, b_N, c_N = self._selected(x_E)
    own = {"b": b_N, "x": x_E}
    inputs = self.dense.fuse_inputs(x_D, own, shallow)
    a_NE = -jnp.exp(self.a_log[...])
    record_memory(
        lambda: dt.dt()[..., None, :] * jnp.expand_dims(a_NE, range(x_D.ndim - 1))
    )
    states = self.recurrence(
        dt, a_NE, inputs.fused["x"], inputs.fused["b"], tokens, h_BNE
    )
    epilogue = Epilogue(self.d[...], inputs.own["x"], z_E, dtype=x_D.dtype)
    output, h_BNE, states = self.dense.run(x_D, c_N, states, shallow, epilogue)
    return MixerOutput(
        self.out_proj(output.y), MambaState(tail_BWE, h_BNE),
        self.dense.share(inputs, states),
    )

  def init_state(self, batch: int) -> MambaState:
    """See `Mixer`."""
    return MambaState(
        self.conv.init_state(batch), jnp.zeros((batch, self.state_size, self.width), jnp.float32)
    )
