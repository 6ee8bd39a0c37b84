"""Mamba-2 (arXiv 2405.21060): state space duality, one scalar decay a head.

    x, z, (B, C, dt) = W_in u, W_gate u, W_bcdt u
    x, B, C = silu(conv(x)), silu(conv(B)), silu(conv(C)),     dt = clip(softplus(dt + b_dt))
    h_t = exp(dt A) h_{t-1} + dt x B^T,     y = h C + D x,     out = W_out norm(y silu(z))

Heads of a group share B and C, and the gated norm is taken over a group's channels.
Initialisation as published (the released code): A uniform in [-16, -1], softplus(b_dt)
log-uniform in [dt_min, dt_max], D = 1, and the output projection divided by sqrt(L).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Segments
from dense_jax.config import ModelConfig, integer, invalid, number
from dense_jax.layers.dense_connection import DenseConnection, Shared
from dense_jax.layers.linear import Linear, RMSNorm, fan_in_uniform, parameter
from dense_jax.layers.mixer import MixerOutput
from dense_jax.layers.selective import SelectiveConfig, ShortConv
from dense_jax.ops import dispatch, reference
from dense_jax.ops.matmul import materialize, spread
from dense_jax.ops.state_sequence import StateSequence
from dense_jax.ops.states import scan_matrix
from dense_jax.ops.token_states import MatrixState
from dense_jax.sharding import constrain_tokens
from dense_jax.types import Array, PyTree


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


class Mamba2(nnx.Module):
  """The mixer. Its state: {"x", "bc": the convolutions' tails, "h": h_BHPN in float32}."""

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
    self.implementation = dispatch.resolve("matrix", config.implementation)
    self.chunk = config.chunk

    bc_width = 2 * self.groups * self.state_size

    def widen(width: int, axis: str | None) -> Linear:
      return Linear(config.width, width, axes=("embed", axis), init=fan_in_uniform(), rngs=rngs)

    # Apart, so that each device of a mesh has the same heads of both; what all heads of a group
    # share, and a number a head beside it, every device makes for itself.
    self.in_proj, self.gate_proj = widen(self.width, "inner"), widen(self.width, "inner")
    self.bcdt_proj = widen(bc_width + self.heads, None)
    self.x_conv = ShortConv(options, self.width, "inner", config.dtype, rngs)
    self.bc_conv = ShortConv(options, bc_width, None, config.dtype, rngs)
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
    self.dense = DenseConnection(
        config, sources=sources, rngs=rngs, query=(self.groups, self.state_size),
        channels=self.width,
        inputs={"b": (self.groups * self.state_size, None), "x": (self.width, "inner")},
    )

  def _project(self, x: Array) -> tuple[Array, Array, Array, Array]:
    """z, the convolutions' inputs x and (B, C), and dt [..., H] (float32) of [..., D]."""
    # Whole on each device: dt, whose heads are split, would have the compiler split all of it.
    bcdt = constrain_tokens(self.bcdt_proj(x), None)
    bc, dt = jnp.split(bcdt, [2 * self.groups * self.state_size], axis=-1)
    dt = jax.nn.softplus(dt.astype(jnp.float32) + spread(self.dt_bias[...], dt))
    dt = jnp.clip(dt, *self.dt_limit)
    return self.gate_proj(x), self.in_proj(x), bc, dt

  def _by_group(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.groups, self.state_size)

  def _by_head(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.heads, self.head_dim)

  def _recurrence(self, dt: Array, fused: dict[str, Array]) -> tuple[Array, Array, Array]:
    """log decay (float32), B by group and dt x by head."""
    a = spread(-jnp.exp(self.a_log[...]), dt)
    x = self._by_head(fused["x"])
    return dt * a, self._by_group(fused["b"]), (dt[..., None] * x).astype(x.dtype)

  def _output(self, y: Array, x: Array, z: Array) -> Array:
    """Skip connection, gated norm and output projection of reads [..., H, P]."""
    x = self._by_head(x).astype(jnp.float32)
    y = y + spread(self.d[...][:, None], x) * x
    y = y.reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))
    return self.out_proj(self.norm(y).astype(z.dtype))

  def __call__(
      self, x_BTD: Array, segments: Segments, state: PyTree | None, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`."""
    z_BTE, x_BTE, bc, dt_BTH = self._project(x_BTD)
    x_BTE, x_tail = self.x_conv(x_BTE, segments, state and state["x"])
    bc, bc_tail = self.bc_conv(bc, segments, state and state["bc"])
    b, c = jnp.split(bc, 2, axis=-1)
    own, c_BTJN = {"b": b, "x": x_BTE}, self._by_group(c)
    fused, inputs = self.dense.fuse_inputs(x_BTD, own, shallow)
    log_decay_BTH, b_BTJN, v_BTHP = self._recurrence(dt_BTH, fused)
    states: StateSequence = scan_matrix(
        b_BTJN, v_BTHP, log_decay_BTH, segments, state and state["h"],
        implementation=self.implementation, chunk=self.chunk,
    )
    y_BTHP, states, shared = self.dense.read(x_BTD, c_BTJN, states, shallow)
    y_BTD = self._output(y_BTHP, own["x"], z_BTE)
    after = {"x": x_tail, "bc": bc_tail, "h": states.final()}
    return MixerOutput(y_BTD, after, shared, inputs)

  def step(
      self, x_BD: Array, position_B: Array, state: PyTree, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`."""
    del position_B
    z_BE, x_BE, bc, dt_BH = self._project(x_BD)
    x_BE, x_tail = self.x_conv.step(x_BE, state["x"])
    bc, bc_tail = self.bc_conv.step(bc, state["bc"])
    b, c = jnp.split(bc, 2, axis=-1)
    own, c_BJN = {"b": b, "x": x_BE}, self._by_group(c)
    fused, inputs = self.dense.fuse_inputs(x_BD, own, shallow)
    log_decay_BH, b_BJN, v_BHP = self._recurrence(dt_BH, fused)
    h_BHPN = reference.matrix_step(
        state["h"], log_decay_BH, materialize(b_BJN), materialize(v_BHP)
    )
    y_BHP, _, shared = self.dense.read(x_BD, c_BJN, MatrixState(h_BHPN), shallow)
    y_BD = self._output(y_BHP, own["x"], z_BE)
    return MixerOutput(y_BD, {"x": x_tail, "bc": bc_tail, "h": h_BHPN}, shared, inputs)

  def init_state(self, batch: int) -> PyTree:
    """See `Mixer`."""
    shape = (batch, self.heads, self.head_dim, self.state_size)
    return {
        "x": self.x_conv.init_state(batch), "bc": self.bc_conv.init_state(batch),
        "h": jnp.zeros(shape, jnp.float32),
    }
