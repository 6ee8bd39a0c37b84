"""Feed-forward layers, which follow the mixers of some families."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.linear import Linear, normal
from dense_jax.types import Array

# Kind -> (activation, true if the activated map multiplies a second one).
KINDS: Mapping[str, tuple[Callable[[Array], Array], bool]] = {
    "swiglu": (jax.nn.silu, True),
    "gelu": (functools.partial(jax.nn.gelu, approximate=False), False),
}


class FeedForward(nnx.Module):
  """A feed-forward layer on each token alone, D -> F -> D.

      swiglu   W_down (silu(W_gate x) * W_up x)     (arXiv 2002.05202)
      gelu     W_down gelu(W_up x), with the exact gelu

  Weights start Gaussian with standard deviation 0.02, divided for the last map by sqrt(2 L), as
  2 L terms are added to the residual stream.

  Args:
    config: the model.
    width: F.
    kind: a key of `KINDS`.
  """

  def __init__(self, config: ModelConfig, width: int, *, kind: str, rngs: nnx.Rngs) -> None:
    self.activation, self.gated = KINDS[kind]

    def widen() -> Linear:
      return Linear(config.width, width, axes=("embed", "inner"), init=normal(0.02), rngs=rngs)

    if self.gated:
      self.gate_proj = widen()
    self.up_proj = widen()
    self.down_proj = Linear(
        width, config.width, axes=("inner", "embed"),
        init=normal(0.02 / math.sqrt(2 * config.layers)), rngs=rngs,
    )

  def __call__(self, x: Array) -> Array:
    """Maps [..., D] to [..., D], in x's dtype."""
    up = self.up_proj(x)
    inner = self.activation(self.gate_proj(x)) * up if self.gated else self.activation(up)
    return self.down_proj(inner)
