"""RetNet (arXiv 2307.08621): multi-scale retention, then a feed-forward layer.

    q, v, g = W_q u, W_v u, silu(W_g u)      k = W_k u / sqrt(N)
    out = W_o (GroupNorm_head(retention(q, k, v)) * g)

As published (equations 6 to 9): decays whose reach doubles from head to head, rotated queries and
keys, a group norm over each head without learned scales, values of width 2 D, and a feed-forward
layer of the same width with GELU.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import Config, ModelConfig, integer
from dense_jax.layers.feed_forward import FeedForward
from dense_jax.layers.retention import Retention
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class RetNetConfig(Config, key="config.model.mixer"):
  """Options of RetNet."""

  heads: int = integer(4, 1, help="H: heads; N = K / H")
  key_dim: int = integer(
      0, 0, help="K: width of queries and keys, all heads together; 0 means D")
  expand: int = integer(2, 1, help="E = expand * D: width of values, all heads together")
  ffn_width: int = integer(0, 0, help="width of the feed-forward layer; 0 means 2 D")


def feed_forward(config: ModelConfig, rngs: nnx.Rngs) -> FeedForward:
  """Makes the layer that follows the mixer."""
  return FeedForward(config, config.mixer.ffn_width or 2 * config.width, kind="gelu", rngs=rngs)


class RetNet(Retention):
  """RetNet's mixer, multi-scale retention; see `Mixer`."""

  def __init__(self, config: ModelConfig, *, sources: int, rngs: nnx.Rngs) -> None:
    options: RetNetConfig = config.mixer
    super().__init__(
        config, heads=options.heads, key_dim=options.key_dim or config.width,
        width=options.expand * config.width, sources=sources, rngs=rngs,
    )
    self.v_proj = self.project(config, self.width, "inner", rngs)
    self.gate_proj = self.project(config, self.width, "inner", rngs)
    self.epsilon = config.norm_eps

  def inputs(self, x_D: Array) -> tuple[Array, dict[str, Array], Array]:
    """See `Retention`."""
    k = self.k_proj(x_D) * (self.key_dim // self.heads) ** -0.5
    return self.q_proj(x_D), {"k": k, "v": self.v_proj(x_D)}, self.gate_proj(x_D)

  def normalize(self, mean_H: Array, square_H: Array) -> tuple[Array, Array | None]:
    """See `Retention`."""
    variance_H = jnp.maximum(square_H - jnp.square(mean_H), 0)
    factor_H = jax.lax.rsqrt(variance_H + self.epsilon)
    return factor_H, -mean_H * factor_H
