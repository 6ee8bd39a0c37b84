"""One layer: a mixer that moves information along time and, in some families, a feed-forward."""

from collections.abc import Callable, Sequence

from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import ModelConfig
from dense_jax.layers.dense.connection import Shared
from dense_jax.layers.linear import RMSNorm
from dense_jax.layers.metrics import record_rms
from dense_jax.layers.mixer import Mixer
from dense_jax.layers.observation import observe_residual, observe_shallow
from dense_jax.sharding import constrain_tokens
from dense_jax.types import Array, PyTree

MixerFactory = Callable[..., Mixer]
FeedForwardFactory = Callable[[ModelConfig, nnx.Rngs], nnx.Module | None]


class Layer(nnx.Module):
  """A layer: x + mixer(norm(x)), then x + feed_forward(ffn_norm(x)) in families that have one.

  Args:
    config: the model's configuration.
    mixer: makes the family's mixer.
    feed_forward: makes the module that follows the mixer. None, or a result of None, means that
      nothing follows.
    sources: S, the number of shallower layers that this one reads.
    rngs: the random keys of fresh parameters.
  """

  def __init__(
      self,
      config: ModelConfig,
      mixer: MixerFactory,
      feed_forward: FeedForwardFactory | None,
      *,
      sources: int,
      rngs: nnx.Rngs,
  ) -> None:
    self.norm = RMSNorm(config.width, axis="embed", epsilon=config.norm_eps, rngs=rngs)
    self.mixer = mixer(config, sources=sources, rngs=rngs)
    module = feed_forward(config, rngs) if feed_forward else None
    if module is not None:
      self.ffn_norm = RMSNorm(config.width, axis="embed", epsilon=config.norm_eps, rngs=rngs)
      self.feed_forward = module

  def __call__(
      self, x: Array, tokens: Segments | Token, state: PyTree | None, shallow: Sequence[Shared]
  ) -> tuple[Array, PyTree, Shared]:
    """Runs a sequence, or one token of decoding.

    Args:
      x: the residual stream, [B, T, D], or [B, D] for a Token.
      tokens: the sequence's documents, or the token's position.
      state: the mixer's state before the first token; None means a fresh one, and is not allowed
        for a Token.
      shallow: what the layers below share, nearest first.

    Returns:
      The residual stream after this layer, the mixer's state after the last token, and what
      deeper layers may read.
    """
    output = self.mixer(self.norm(x), tokens, state, observe_shallow(shallow))
    x = constrain_tokens(x + output.y, "embed")
    if hasattr(self, "feed_forward"):
      x = constrain_tokens(x + self.feed_forward(self.ffn_norm(x)), "embed")
    record_rms("residual_rms", x)
    return observe_residual(x), output.state, output.shared
