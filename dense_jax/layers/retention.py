"""Retention (arXiv 2307.08621): what families with a constant decay a head share.

    h_t = gamma h_{t-1} + v_t rot(k_t)^T,      y_t = h_t rot(q_t) / sqrt(sum_{s<=t} gamma^(t-s))

The published parallel form divides by the scores' absolute sum too, which the norm of each
head undoes; here the divisor depends on the position alone, so that every mode and every
chunk length computes the same function.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dense_jax.batch import Segments
from dense_jax.config import ModelConfig, invalid
from dense_jax.layers.dense_connection import DenseConnection, Shared
from dense_jax.layers.linear import Linear, xavier_uniform
from dense_jax.layers.mixer import MixerOutput
from dense_jax.ops import dispatch, reference
from dense_jax.ops.matmul import materialize
from dense_jax.ops.rotary import rotation
from dense_jax.ops.state_sequence import StateSequence
from dense_jax.ops.states import scan_matrix
from dense_jax.ops.token_states import MatrixState
from dense_jax.types import Array, PyTree


def log_decay(heads: int) -> Array:
  """log gamma_H, with gamma = 1 - 2^(-5 - head) (arXiv 2307.08621, section 2.2)."""
  return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads, dtype=jnp.float32))))


def rotate(x: Array, position: Array) -> Array:
  """Rotates neighbouring pairs of the last axis by position * angle.

  Args:
    x: [..., H, N].
    position: int32 >= 0 [...], its leading axis may be 1.

  Returns:
    x's shape and dtype. Angles fall from 1 to 1e-4 over the N / 2 pairs.
  """
  half = x.shape[-1] // 2
  cos, sin = rotation(position[..., None], 10000.0 ** -np.linspace(0.0, 1.0, half))
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)


class Retention(nnx.Module):
  """The mixer but for its projections and norm. Its state: {"h": h_BHPN in float32}.

  Args:
    config: the model.
    heads: H.
    key_dim: K.
    width: E.
    sources: S.
  """

  def __init__(
      self, config: ModelConfig, *, heads: int, key_dim: int, width: int, sources: int,
      rngs: nnx.Rngs,
  ) -> None:
    self.heads, self.key_dim, self.width = heads, key_dim, width
    for name, value in (("key_dim", key_dim), ("heads", width)):
      if value % heads or (name == "key_dim" and (value // heads) % 2):
        raise invalid(
            f"config.model.mixer.{name}", getattr(config.mixer, name),
            "key_dim a multiple of 2 * heads and expand * width a multiple of heads",
        )
    self.implementation = dispatch.resolve("matrix", config.implementation)
    self.chunk = config.chunk
    self.q_proj = self.project(config, key_dim, "heads", rngs)
    self.k_proj = self.project(config, key_dim, "heads", rngs)
    self.out_proj = Linear(
        width, config.width, axes=("inner", "embed"), init=xavier_uniform(0.5), rngs=rngs
    )
    self.dense = DenseConnection(
        config, sources=sources, rngs=rngs, query=(heads, key_dim // heads), channels=width,
        inputs={"k": (key_dim, "heads"), "v": (width, "inner")},
    )

  def project(
      self, config: ModelConfig, width: int, axis: str, rngs: nnx.Rngs, *, parts: int = 1
  ) -> Linear:
    """A map from the layer's input, started as published: as one of `parts` of a matrix."""
    init = xavier_uniform(2**-2.5, parts=parts)
    return Linear(config.width, width, axes=("embed", axis), init=init, rngs=rngs)

  def inputs(self, x: Array) -> tuple[Array, dict[str, Array], Array]:
    """The query, the recurrence's own inputs k and v, and the output gate of [..., D]."""
    raise NotImplementedError

  def normalize(self, y: Array) -> Array:
    """The norm of each head, [..., H, P] in float32."""
    raise NotImplementedError

  def _by_head(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.heads, -1)

  def _output(self, y: Array, position: Array, gate: Array) -> Array:
    """Scale, norm of each head, gate and output projection of reads [..., H, P]."""
    gamma_log = log_decay(self.heads).reshape((1,) * (y.ndim - 2) + (-1,))
    # sum over s <= t of gamma^(t - s), in closed form.
    count = position.astype(jnp.float32)[..., None] + 1
    mass = jnp.expm1(count * gamma_log) / jnp.expm1(gamma_log)
    y = self.normalize(y * jax.lax.rsqrt(mass)[..., None])
    return self.out_proj(y.reshape(gate.shape).astype(gate.dtype) * gate)

  def __call__(
      self, x_BTD: Array, segments: Segments, state: PyTree | None, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`."""
    position_BT = segments.positions_BT
    q_BTK, own, gate_BTE = self.inputs(x_BTD)
    fused, inputs = self.dense.fuse_inputs(x_BTD, own, shallow)
    q_BTHN = rotate(self._by_head(q_BTK), position_BT)
    k_BTHN = rotate(self._by_head(fused["k"]), position_BT)
    decay_BTH = jnp.broadcast_to(
        log_decay(self.heads)[None, None], (1, x_BTD.shape[1], self.heads)
    )
    states: StateSequence = scan_matrix(
        k_BTHN, self._by_head(fused["v"]), decay_BTH, segments, state and state["h"],
        implementation=self.implementation, chunk=self.chunk,
    )
    y_BTHP, states, shared = self.dense.read(x_BTD, q_BTHN, states, shallow)
    y_BTD = self._output(y_BTHP, position_BT, gate_BTE)
    return MixerOutput(y_BTD, {"h": states.final()}, shared, inputs)

  def step(
      self, x_BD: Array, position_B: Array, state: PyTree, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`."""
    q_BK, own, gate_BE = self.inputs(x_BD)
    fused, inputs = self.dense.fuse_inputs(x_BD, own, shallow)
    q_BHN = rotate(self._by_head(q_BK), position_B)
    k_BHN = materialize(rotate(self._by_head(fused["k"]), position_B))
    h_BHPN = reference.matrix_step(
        state["h"], log_decay(self.heads)[None], k_BHN, self._by_head(fused["v"])
    )
    y_BHP, _, shared = self.dense.read(x_BD, q_BHN, MatrixState(h_BHPN), shallow)
    y_BD = self._output(y_BHP, position_B, gate_BE)
    return MixerOutput(y_BD, {"h": h_BHPN}, shared, inputs)

  def init_state(self, batch: int) -> PyTree:
    """See `Mixer`."""
    channels, keys = self.width // self.heads, self.key_dim // self.heads
    return {"h": jnp.zeros((batch, self.heads, channels, keys), jnp.float32)}
