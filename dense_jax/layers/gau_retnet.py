"""Gated-attention-unit retention: the layer of the released DenseRetNet.

    q = silu(W_q u)      k = silu(W_k u) / sqrt(N)      v, g = silu(W_v u), silu(W_g u)
    out = W_o (RMSNorm_head(retention(q, k, v)) * g)

Source: arXiv 2403.00818, section 4, and its released code.
"""

import dataclasses

import jax
from flax import nnx

from dense_jax.config import Config, ModelConfig, integer
from dense_jax.layers.linear import RMSNorm
from dense_jax.layers.retention import Retention
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class GauRetNetConfig(Config, key="config.model.mixer"):
  """Options of GAU-RetNet."""

  heads: int = integer(2, 1, help="H: heads; N = K / H")
  key_dim: int = integer(
      0, 0, help="K: width of queries and keys, all heads together; 0 means D / 2")
  expand: int = integer(2, 1, help="E = expand * D: width of values, all heads together")


class GauRetNet(Retention):
  """GAU-RetNet's mixer; see `Mixer`."""

  def __init__(self, config: ModelConfig, *, sources: int, rngs: nnx.Rngs) -> None:
    options: GauRetNetConfig = config.mixer
    super().__init__(
        config, heads=options.heads, key_dim=options.key_dim or config.width // 2,
        width=options.expand * config.width, sources=sources, rngs=rngs,
    )
    # Two maps, so that each device of a mesh has the same heads of both; initialised as parts of
    # one matrix.
    self.v_proj, self.gate_proj = (
        self.project(config, self.width, "inner", rngs, parts=2) for _ in range(2)
    )
    self.head_norm = RMSNorm(
        self.width // self.heads, axis=None, epsilon=config.norm_eps, rngs=rngs
    )

  def inputs(self, x_D: Array) -> tuple[Array, dict[str, Array], Array]:
    """See `Retention`."""
    v = jax.nn.silu(self.v_proj(x_D))
    scale = (self.key_dim // self.heads) ** -0.5
    q, k = jax.nn.silu(self.q_proj(x_D)), jax.nn.silu(self.k_proj(x_D)) * scale
    return q, {"k": k, "v": v}, self.gate_proj(x_D)

  def normalize(self, mean_H: Array, square_H: Array) -> tuple[Array, Array | None]:
    """See `Retention`."""
    del mean_H
    return jax.lax.rsqrt(square_H + self.head_norm.epsilon), None

  def norm_scale(self) -> Array | None:
    """See `Retention`."""
    return self.head_norm.scale[...]
