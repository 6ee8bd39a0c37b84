"""Mamba-2 (arXiv 2405.21060): state space duality, with one scalar decay per head.

    x, z, (B, C, dt) = W_in u, W_gate u, W_bcdt u
    x, B, C = silu(conv(x)), silu(conv(B)), silu(conv(C)),     dt = clip(softplus(dt + b_dt))
    h_t = exp(dt A) h_{t-1} + dt x B^T,     y = h C + D x,     out = W_out norm(y silu(z))

Heads of a group share B and C, and the gated norm is taken over a group's channels.
Initialisation as published (the released code): A uniform in [-16, -1], softplus(b_dt)
log-uniform in [dt_min, dt_max], D = 1, and an output projection that is divided by sqrt(L).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import ModelConfig, integer, invalid, number
from dense_jax.layers.dense import make_connection
from dense_jax.layers.dense.connection import Shared
from dense_jax.layers.linear import Linear, RMSNorm, fan_in_uniform, parameter
from dense_jax.layers.metrics import record_memory
from dense_jax.layers.mixer import MixerOutput
from dense_jax.layers.selective import SelectiveConfig, ShortConv
from dense_jax.ops import resolver
from dense_jax.ops.cpu import spread
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import Sizes
from dense_jax.sharding import constrain_tokens
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Mamba2Config(SelectiveConfig):
  """Mamba-2's own options, beside those of `SelectiveConfig`."""

  state_size: int = integer(128, 1, help="N: state numbers of each of a head's channels")
  head_dim: int = integer(64, 1, help="P: channels of a head; divides E, and H = E / P")
  groups: int = integer(1, 1, help="J: groups of heads that share B and C; divides H")
  dt_limit_min: float = number(0.0, 0, help="dt is raised to at least this")
  dt_limit_max: float = number(0.0, 0, help="dt is cut to at most this; 0 means no limit")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.dt_limit_max and self.dt_limit_max < self.dt_limit_min:
      raise invalid(
          "config.model.mixer.dt_limit_max", self.dt_limit_max,
          f"0 (no limit) or a number >= dt_limit_min = {self.dt_limit_min:g}",
      )


def _init_a_log(key: Array, shape: tuple[int, ...]) -> Array:
  return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State:
  """The mixer's state.

  Attributes:
    x_tail_BWE: the last W - 1 inputs of the convolution of x, in the model's dtype.
    bc_tail_BWN: the same for B and C, 2 J N channels.
    h_BHPN: the recurrence's state, float32.
  """

  x_tail_BWE: Array
  bc_tail_BWN: Array
  h_BHPN: Array


class Mamba2(nnx.Module):
  """Mamba-2's mixer; see `Mixer`."""

  form: ClassVar[str] = "matrix"

  def __init__(self, config: ModelConfig, *, sources: int, rngs: nnx.Rngs) -> None:
    options: Mamba2Config = config.mixer
    self.width = options.expand * config.width
    self.heads, self.groups = self.width // options.head_dim, options.groups
    self.head_dim, self.state_size = options.head_dim, options.state_size
    if self.width % options.head_dim:
      raise invalid(
          "config.model.mixer.head_dim", options.head_dim,
          f"a divisor of expand * width = {self.width}",
      )
    if self.heads % self.groups:
      raise invalid(
          "config.model.mixer.groups", self.groups, f"a divisor of {self.heads}, the heads"
      )
    self.dt_limit = (options.dt_limit_min, options.dt_limit_max or math.inf)
    self.recurrence = resolver.matrix_form(config.implementation, config.chunk)

    bc_width = 2 * self.groups * self.state_size

    def widen(width: int, axis: str | None) -> Linear:
      return Linear(config.width, width, axes=("embed", axis), init=fan_in_uniform(), rngs=rngs)

    # Two maps, so that each device of a mesh has the same heads of both. B and C, which the heads
    # of a group share, and dt, one number per head, are computed whole on every device.
    self.in_proj, self.gate_proj = widen(self.width, "inner"), widen(self.width, "inner")
    self.bcdt_proj = widen(bc_width + self.heads, None)
    self.x_conv = ShortConv(options, self.width, "inner", config, self.form, rngs)
    self.bc_conv = ShortConv(options, bc_width, None, config, self.form, rngs)
    self.dt_bias = parameter(rngs, (self.heads,), ("heads",), options.init_dt_bias)
    self.a_log = parameter(rngs, (self.heads,), ("heads",), _init_a_log)
    self.d = parameter(rngs, (self.heads,), ("heads",), lambda _, shape: jnp.ones(shape))
    self.norm = RMSNorm(
        self.width, axis="inner", epsilon=config.norm_eps, groups=self.groups, rngs=rngs
    )
    self.out_proj = Linear(
        self.width, config.width, axes=("inner", "embed"),
        init=fan_in_uniform(1 / math.sqrt(config.layers)), rngs=rngs,
    )
    self.dense = make_connection(
        config, form=self.form, sources=sources, rngs=rngs,
        query=(self.groups, self.state_size), channels=self.width,
        inputs={"b": (self.groups * self.state_size, None), "x": (self.width, "inner")},
    )

  @property
  def sizes(self) -> Sizes:
    """The sizes of the recurrence's states."""
    return Sizes(self.heads, self.groups, self.head_dim, self.state_size)

  def _project(self, x_D: Array) -> tuple[Array, Array, Array, Array]:
    """Returns z, the convolutions' inputs x and (B, C), and dt; dt is float32."""
    # Whole on each device: otherwise dt, whose heads are split, makes the compiler split all of it.
    bcdt = constrain_tokens(self.bcdt_proj(x_D), None)
    bc, dt_H = jnp.split(bcdt, [2 * self.groups * self.state_size], axis=-1)
    dt_H = jax.nn.softplus(dt_H.astype(jnp.float32) + spread(self.dt_bias[...], dt_H))
    dt_H = jnp.clip(dt_H, *self.dt_limit)
    return self.gate_proj(x_D), self.in_proj(x_D), bc, dt_H

  def _by_group(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.groups, self.state_size)

  def _output(self, output: Output) -> Array:
    """Applies the norm and the output projection."""
    assert output.moments is not None
    squares_H = output.moments[..., 1]
    squares_J = jnp.sum(squares_H.reshape(*squares_H.shape[:-1], self.groups, -1), axis=-1)
    return self.out_proj.of_normed(
        self.norm, output.y.reshape(*squares_H.shape[:-1], self.width), squares_J
    )

  def __call__(
      self, x_D: Array, tokens: Segments | Token, state: Mamba2State | None,
      shallow: Sequence[Shared],
  ) -> MixerOutput:
    """See `Mixer`."""
    x_tail_BWE = bc_tail_BWN = h_BHPN = None
    if state is not None:
      x_tail_BWE, bc_tail_BWN, h_BHPN = state.x_tail_BWE, state.bc_tail_BWN, state.h_BHPN
    z_E, x_E, bc, dt_H = self._project(x_D)
    x_E, x_tail_BWE = self.x_conv(x_E, tokens, x_tail_BWE)
    bc, bc_tail_BWN = self.bc_conv(bc, tokens, bc_tail_BWN)
    b, c = jnp.split(bc, 2, axis=-1)
    own = {"b": b, "x": x_E}
    inputs = self.dense.fuse_inputs(x_D, own, shallow)
    log_decay_H = dt_H * spread(-jnp.exp(self.a_log[...]), dt_H)
    record_memory(lambda: log_decay_H)
    states = self.recurrence(
        self._by_group(inputs.fused["b"]), inputs.fused["x"], dt_H, log_decay_H, tokens, h_BHPN
    )
    epilogue = Epilogue(
        self.d[...], inputs.own["x"], z_E, dtype=x_D.dtype, moments=True
    )
    output, h_BHPN, states = self.dense.run(x_D, self._by_group(c), states, shallow, epilogue)
    return MixerOutput(
        self._output(output), Mamba2State(x_tail_BWE, bc_tail_BWN, h_BHPN),
        self.dense.share(inputs, states),
    )

  def init_state(self, batch: int) -> Mamba2State:
    """See `Mixer`."""
    shape = (batch, self.heads, self.head_dim, self.state_size)
    return Mamba2State(
        self.x_conv.init_state(batch), self.bc_conv.init_state(batch),
        jnp.zeros(shape, jnp.float32),
    )
