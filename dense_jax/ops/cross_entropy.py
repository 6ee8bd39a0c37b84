"""Cross-entropy against a large vocabulary without [B, T, V] logits."""

import functools

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import split_time
from dense_jax.types import Array


def _is_target(targets: Array, vocabulary: int) -> Array:
  """Returns a one-hot bool mask [..., V] of the targets."""
  return targets[..., None] == jnp.arange(vocabulary).reshape((1,) * targets.ndim + (-1,))


def token_cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
  """Computes the negative log-likelihood of each target.

  Args:
    logits: [..., V], any float dtype.
    targets: int32 [...].

  Returns:
    nll and log_z (the log-sum-exp of the logits), [...], float32, in nats.
  """
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A masked sum instead of a lookup: the vocabulary may be split over devices, and sums add up.
  is_target = _is_target(targets, logits.shape[-1])
  return log_z - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), log_z


def _by_chunk(chunk: int, *arrays_BT: Array) -> tuple[Array, ...]:
  """Splits each [B, T, ...] into [G, B, C, ...], padded with zeros."""
  return tuple(jnp.moveaxis(split_time(x, chunk), 1, 0) for x in arrays_BT)


def _joined(x_GBC: Array, time: int) -> Array:
  """Joins the chunks [G, B, C, ...] to [B, T, ...]."""
  _, batch, _, *rest = x_GBC.shape
  return jnp.moveaxis(x_GBC, 0, 1).reshape(batch, -1, *rest)[:, :time]


def _logits(hidden_BCD: Array, head_DV: Array) -> Array:
  return jnp.einsum("bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, chunk: int
) -> tuple[Array, Array]:
  low_DV = head_DV.astype(hidden_BTD.dtype)

  def body(carry: None, inputs: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
    hidden_BCD, targets_BC = inputs
    return carry, token_cross_entropy(_logits(hidden_BCD, low_DV), targets_BC)

  _, outputs = jax.lax.scan(body, None, _by_chunk(chunk, hidden_BTD, targets_BT))
  nll_BT, log_z_BT = (_joined(x, targets_BT.shape[1]) for x in outputs)
  return nll_BT, log_z_BT


def _forward(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, chunk: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
  nll_BT, log_z_BT = _cross_entropy(hidden_BTD, head_DV, targets_BT, chunk)
  return (nll_BT, log_z_BT), (hidden_BTD, head_DV, targets_BT, log_z_BT)


def _backward(
    chunk: int, saved: tuple[Array, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array, None]:
  hidden_BTD, head_DV, targets_BT, log_z_BT = saved
  low_DV = head_DV.astype(hidden_BTD.dtype)

  def body(d_head_DV: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    hidden_BCD, targets_BC, log_z_BC, d_nll_BC, d_log_z_BC = inputs
    probability_BCV = jnp.exp(_logits(hidden_BCD, low_DV) - log_z_BC[..., None])
    is_target_BCV = _is_target(targets_BC, head_DV.shape[1])
    d_logits_BCV = (d_nll_BC + d_log_z_BC)[..., None] * probability_BCV - jnp.where(
        is_target_BCV, d_nll_BC[..., None], 0.0
    )
    d_logits_BCV = d_logits_BCV.astype(hidden_BCD.dtype)
    d_head_DV = d_head_DV + jnp.einsum(
        "bcd,bcv->dv", hidden_BCD, d_logits_BCV, preferred_element_type=jnp.float32
    )
    return d_head_DV, jnp.einsum("bcv,dv->bcd", d_logits_BCV, low_DV)

  chunks = _by_chunk(chunk, hidden_BTD, targets_BT, log_z_BT, *gradients)
  d_head_DV, d_hidden = jax.lax.scan(body, jnp.zeros(head_DV.shape, jnp.float32), chunks)
  return _joined(d_hidden, targets_BT.shape[1]), d_head_DV.astype(head_DV.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def chunked_cross_entropy(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, *, chunk: int
) -> tuple[Array, Array]:
  """Computes `token_cross_entropy(hidden @ head, targets)`, `chunk` tokens of a row at a time.

  The backward pass recomputes a chunk's logits and turns them into gradients at once, so that
  at most [B, chunk, V] logits exist. The head's gradient is summed over chunks in float32.

  Args:
    hidden_BTD: the last norm's output, in the compute dtype.
    head_DV: the output matrix; cast to hidden's dtype, with float32 sums.
    targets_BT: int32 token ids.
    chunk: tokens of a row per step; values above T mean T.

  Returns:
    nll_BT and log_z_BT, float32, in nats.
  """
  chex.assert_shape(targets_BT, hidden_BTD.shape[:2])
  return _cross_entropy(hidden_BTD, head_DV, targets_BT, min(chunk, targets_BT.shape[1]))
