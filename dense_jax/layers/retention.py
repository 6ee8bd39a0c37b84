"""Retention (arXiv 2307.08621), the mixer of families with a constant decay per head.

    h_t = gamma h_{t-1} + v_t rot(k_t)^T,      y_t = h_t rot(q_t) / sqrt(sum_{s<=t} gamma^(t-s))

The published parallel form also divides by the absolute sum of the scores, which the norm of each
head undoes. Here the divisor depends on the position alone, so that every mode and every chunk
length computes the same function.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import ModelConfig, invalid
from dense_jax.layers.dense import make_connection
from dense_jax.layers.dense.connection import Shared
from dense_jax.layers.linear import Linear, xavier_uniform
from dense_jax.layers.metrics import record_memory
from dense_jax.layers.mixer import MixerOutput
from dense_jax.ops import resolver
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.gated_norm import gated_norm
from dense_jax.ops.recurrence import Sizes
from dense_jax.ops.rotary import rotate_neighbours
from dense_jax.types import Array

# Over 2^31 tokens, a head that forgets 2^-100 a token still keeps all of them in float32.
_LAST_EXPONENT = 100.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetentionState:
  """The recurrence's state, h_BHPN, float32."""

  h_BHPN: Array


class Retention(nnx.Module):
  """The base class of retention mixers, which add their projections and norm; see `Mixer`.

  Args:
    config: the model.
    heads: H.
    key_dim: K, the query and key width of all heads together.
    width: E.
    sources: S, the layers that are read.

  Raises:
    InputError: K is 0 or not a multiple of 2 H, or E not a multiple of H.
  """

  form: ClassVar[str] = "matrix"

  def __init__(
      self, config: ModelConfig, *, heads: int, key_dim: int, width: int, sources: int,
      rngs: nnx.Rngs,
  ) -> None:
    self.heads, self.key_dim, self.width = heads, key_dim, width
    if not key_dim or key_dim % (2 * heads):
      raise invalid(
          "config.model.mixer.heads", heads,
          f"an integer whose double divides K = {key_dim}, as key_dim = {config.mixer.key_dim} and "
          f"width = {config.width} make it",
      )
    if width % heads:
      raise invalid(
          "config.model.mixer.heads", heads,
          f"a divisor of E = expand * width = {config.mixer.expand} * {config.width}",
      )
    self.recurrence = resolver.matrix_form(
        config.implementation, config.chunk, equal_decays=True
    )
    self.repeat = resolver.heads_function()
    self.q_proj = self.project(config, key_dim, "heads", rngs)
    self.k_proj = self.project(config, key_dim, "heads", rngs)
    self.out_proj = Linear(
        width, config.width, axes=("inner", "embed"), init=xavier_uniform(0.5), rngs=rngs
    )
    self.dense = make_connection(
        config, form=self.form, sources=sources, rngs=rngs,
        query=(heads, key_dim // heads), channels=width,
        inputs={"k": (key_dim, "heads"), "v": (width, "inner")},
    )

  @property
  def sizes(self) -> Sizes:
    """The sizes of the recurrence's states."""
    return Sizes(
        self.heads, self.heads, self.width // self.heads, self.key_dim // self.heads,
        equal_decays=True,
    )

  def project(
      self, config: ModelConfig, width: int, axis: str, rngs: nnx.Rngs, *, parts: int = 1
  ) -> Linear:
    """Makes a map from the layer's input, initialised as one of `parts` parts of a matrix."""
    init = xavier_uniform(2**-2.5, parts=parts)
    return Linear(config.width, width, axes=("embed", axis), init=init, rngs=rngs)

  def inputs(self, x_D: Array) -> tuple[Array, dict[str, Array], Array]:
    """Returns the query, [..., K], the inputs k, [..., K], and v, [..., E], and the output gate.

    The gate, [..., E], is that before its activation, silu.
    """
    raise NotImplementedError

  def normalize(self, mean_H: Array, square_H: Array) -> tuple[Array, Array | None]:
    """Returns the norm of each head as a factor and what is added after it, given means; float32.

    Args:
      mean_H: the mean of each head's channels.
      square_H: the mean of their squares.

    Returns:
      The factor [..., H], and what is added [..., H], or None for nothing.
    """
    raise NotImplementedError

  def norm_scale(self) -> Array | None:
    """Returns the norm's learned scale, [P] for all heads; None means 1."""
    return None

  def log_decay_H(self) -> Array:
    """Returns log gamma_H, with gamma = 1 - 2^(-5 - head) (arXiv 2307.08621, section 2.2).

    The exponent ends at -`_LAST_EXPONENT`: below, 1 - gamma would become a subnormal number, which
    devices take as 0, and the mass of `_output` 0 / 0.
    """
    exponents_H = jnp.minimum(5.0 + jnp.arange(self.heads, dtype=jnp.float32), _LAST_EXPONENT)
    return jnp.log1p(-(2.0**-exponents_H))

  def _by_head(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.heads, -1)

  def _output(self, output: Output, position: Array, gate_E: Array) -> Array:
    """Applies scale, norm of each head, gate and output projection."""
    gamma_log = self.log_decay_H().reshape((1,) * (output.y.ndim - 2) + (-1,))
    # sum over s <= t of gamma^(t - s), in closed form.
    count = position.astype(jnp.float32)[..., None] + 1
    mass_H = jnp.expm1(count * gamma_log) / jnp.expm1(gamma_log)
    scale_H = jax.lax.rsqrt(mass_H)
    assert output.moments is not None
    channels = self.width // self.heads
    mean_H2 = output.moments / channels
    factor_H, added_H = self.normalize(
        mean_H2[..., 0] * scale_H, mean_H2[..., 1] * jnp.square(scale_H)
    )
    x_E = gated_norm(
        output.y.reshape(gate_E.shape), gate_E, factor_H * scale_H, added_H, self.repeat
    )
    if (norm_scale := self.norm_scale()) is None:
      return self.out_proj(x_E)
    return self.out_proj.of_scaled(jnp.tile(norm_scale, self.heads), x_E)

  def __call__(
      self, x_D: Array, tokens: Segments | Token, state: RetentionState | None,
      shallow: Sequence[Shared],
  ) -> MixerOutput:
    """See `Mixer`."""
    position = tokens.positions
    q_K, own, gate_E = self.inputs(x_D)
    inputs = self.dense.fuse_inputs(x_D, own, shallow)
    q_HN = rotate_neighbours(self._by_head(q_K), position)
    k_HN = rotate_neighbours(self._by_head(inputs.fused["k"]), position)
    # All rows share the decay, so its batch axis has size one.
    log_decay_H = jnp.broadcast_to(
        self.log_decay_H().reshape((1,) * (x_D.ndim - 1) + (-1,)),
        (1, *x_D.shape[1:-1], self.heads),
    )
    record_memory(lambda: log_decay_H)
    before_BHPN = None if state is None else state.h_BHPN
    states = self.recurrence(
        k_HN, inputs.fused["v"], None, log_decay_H, tokens, before_BHPN
    )
    epilogue = Epilogue(dtype=x_D.dtype, moments=True)
    output, h_BHPN, states = self.dense.run(x_D, q_HN, states, shallow, epilogue)
    return MixerOutput(
        self._output(output, position, gate_E), RetentionState(h_BHPN),
        self.dense.share(inputs, states),
    )

  def init_state(self, batch: int) -> RetentionState:
    """See `Mixer`."""
    channels, keys = self.width // self.heads, self.key_dim // self.heads
    return RetentionState(jnp.zeros((batch, self.heads, channels, keys), jnp.float32))
