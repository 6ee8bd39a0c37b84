"""Cross-entropy against a large vocabulary without [B, T, V] logits."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import split_time
from dense_jax.types import Array

Sums = Callable[[Array, Array], tuple[Array, Array]]
"""The function that `sums_in_turn` computes."""


def sums_in_turn(logits: Array, is_target: Array) -> tuple[Array, Array]:
  """Computes the log-sum-exp of float32 logits [..., V], and the logit of the target, [...]."""
  # A masked sum instead of a lookup: the vocabulary may be split over devices, and sums add up.
  return (
      jax.nn.logsumexp(logits, axis=-1), jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  )


def sums_at_once(logits: Array, is_target: Array) -> tuple[Array, Array]:
  """Computes `sums_in_turn`, reading the logits once instead of up to three times.

  Each part of the sum of exponentials is relative to the part's largest logit. No forward-mode or
  reverse-mode derivatives.
  """

  def join(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
    largest = jnp.maximum(left[0], right[0])
    exps = left[1] * jnp.exp(left[0] - largest) + right[1] * jnp.exp(right[0] - largest)
    return largest, exps, left[2] + right[2]

  # The first number is finite: the difference of two infinite ones is none.
  initial = tuple(jnp.float32(value) for value in (jnp.finfo(jnp.float32).min, 0, 0))
  operands = logits, jnp.ones_like(logits), jnp.where(is_target, logits, 0.0)
  largest, exps, target = jax.lax.reduce(operands, initial, join, (logits.ndim - 1,))
  return largest + jnp.log(exps), target


@dataclasses.dataclass(frozen=True)
class LogitForm:
  """The way in which a platform computes with a chunk's logits.

  Attributes:
    sums: `sums_in_turn`, or an equivalent.
    again: whether logits are computed again to be differentiated, instead of kept in float32.
  """

  sums: Sums = sums_in_turn
  again: bool = False


def _is_target(targets: Array, vocabulary: int) -> Array:
  """Returns a one-hot bool mask [..., V] of the targets."""
  return targets[..., None] == jnp.arange(vocabulary).reshape((1,) * targets.ndim + (-1,))


def token_cross_entropy(
    logits: Array, targets: Array, sums: Sums = sums_in_turn
) -> tuple[Array, Array]:
  """Computes the negative log-likelihood of each target.

  Args:
    logits: [..., V], any float dtype.
    targets: int32 [...].
    sums: `sums_in_turn`, or an equivalent for the platform.

  Returns:
    nll and log_z (the log-sum-exp of the logits), [...], float32, in nats.
  """
  log_z, target = sums(logits.astype(jnp.float32), _is_target(targets, logits.shape[-1]))
  return log_z - target, log_z


def _by_chunk(chunk: int, *arrays_BT: Array) -> tuple[Array, ...]:
  """Splits each [B, T, ...] into [G, B, C, ...], padded with zeros."""
  return tuple(jnp.moveaxis(split_time(x, chunk), 1, 0) for x in arrays_BT)


def _joined(x_GBC: Array, time: int) -> Array:
  """Joins the chunks [G, B, C, ...] to [B, T, ...]."""
  _, batch, _, *rest = x_GBC.shape
  return jnp.moveaxis(x_GBC, 0, 1).reshape(batch, -1, *rest)[:, :time]


def _logits(hidden_BCD: Array, head_DV: Array) -> Array:
  return jnp.einsum("bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32)


def chunked_cross_entropy(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, *, chunk: int,
    form: LogitForm = LogitForm(),
) -> tuple[Array, Array]:
  """Computes `token_cross_entropy(hidden @ head, targets)`, `chunk` tokens of a row at a time.

  Its gradient would keep all logits; `summed_cross_entropy` is for training.

  Args:
    hidden_BTD: the last norm's output, in the compute dtype.
    head_DV: the output matrix; cast to hidden's dtype, with float32 sums.
    targets_BT: int32 token ids.
    chunk: tokens of a row per step; values above T mean T.
    form: the platform's.

  Returns:
    nll_BT and log_z_BT, float32, in nats.
  """
  chex.assert_shape(targets_BT, hidden_BTD.shape[:2])
  low_DV = head_DV.astype(hidden_BTD.dtype)

  def body(carry: None, inputs: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
    hidden_BCD, targets_BC = inputs
    return carry, token_cross_entropy(_logits(hidden_BCD, low_DV), targets_BC, form.sums)

  time = targets_BT.shape[1]
  _, outputs = jax.lax.scan(body, None, _by_chunk(min(chunk, time), hidden_BTD, targets_BT))
  nll_BT, log_z_BT = (_joined(x, time) for x in outputs)
  return nll_BT, log_z_BT


def chunked_argmax(hidden_BTD: Array, head_DV: Array, *, chunk: int) -> Array:
  """Returns the id of the largest logit of `hidden @ head`, int32 [B, T].

  Args:
    hidden_BTD: see `chunked_cross_entropy`.
    head_DV: see `chunked_cross_entropy`.
    chunk: see `chunked_cross_entropy`.
  """
  low_DV = head_DV.astype(hidden_BTD.dtype)
  time = hidden_BTD.shape[1]
  chunks_GBCD = _by_chunk(min(chunk, time), hidden_BTD)[0]
  best_GBC = jax.lax.map(
      lambda hidden_BCD: jnp.argmax(_logits(hidden_BCD, low_DV), axis=-1).astype(jnp.int32),
      chunks_GBCD,
  )
  return _joined(best_GBC, time)


def summed_cross_entropy(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, *,
    z_loss: float, chunk: int, form: LogitForm = LogitForm(),
) -> tuple[Array, Array]:
  """Computes the sum over tokens of weight * (nll + z_loss * log_z^2), and that of weight * nll.

  Under differentiation a chunk's logits become gradients at once: at most [B, chunk, V] of them
  exist, and the backward pass only scales the gradients. The head's is summed over chunks in
  float32.

  Args:
    hidden_BTD: see `chunked_cross_entropy`.
    head_DV: see `chunked_cross_entropy`.
    targets_BT: see `chunked_cross_entropy`.
    weights_BT: float32; has no gradient.
    z_loss: the weight of log_z^2.
    chunk: see `chunked_cross_entropy`.
    form: see `chunked_cross_entropy`.

  Returns:
    Both sums, float32 scalars, in nats. The second has no gradient.
  """
  chex.assert_equal_shape((targets_BT, weights_BT))
  chunk = min(chunk, targets_BT.shape[1])
  total, nll = _summed(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss, chunk, form)
  return total, jax.lax.stop_gradient(nll)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _summed(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, z_loss: float,
    chunk: int, form: LogitForm,
) -> tuple[Array, Array]:
  nll_BT, log_z_BT = chunked_cross_entropy(
      hidden_BTD, head_DV, targets_BT, chunk=chunk, form=form
  )
  return _totals(weights_BT, nll_BT, log_z_BT, z_loss)


def _totals(
    weights_BT: Array, nll_BT: Array, log_z_BT: Array, z_loss: float
) -> tuple[Array, Array]:
  nll = jnp.sum(weights_BT * nll_BT)
  return nll + z_loss * jnp.sum(weights_BT * log_z_BT**2), nll


def _forward(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, z_loss: float,
    chunk: int, form: LogitForm,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  low_DV = head_DV.astype(hidden_BTD.dtype)

  def body(d_head_DV: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    hidden_BCD, targets_BC, weights_BC = inputs
    logits_BCV = _logits(hidden_BCD, low_DV)
    nll_BC, log_z_BC = token_cross_entropy(logits_BCV, targets_BC, form.sums)
    if form.again:
      logits_BCV = _logits(jax.lax.optimization_barrier(hidden_BCD), low_DV)
    probability_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
    d_log_z_BC = weights_BC * (1 + 2 * z_loss * log_z_BC)
    is_target_BCV = _is_target(targets_BC, head_DV.shape[1])
    d_logits_BCV = d_log_z_BC[..., None] * probability_BCV - jnp.where(
        is_target_BCV, weights_BC[..., None], 0.0
    )
    d_logits_BCV = d_logits_BCV.astype(hidden_BCD.dtype)
    d_head_DV = d_head_DV + jnp.einsum(
        "bcd,bcv->dv", hidden_BCD, d_logits_BCV, preferred_element_type=jnp.float32
    )
    d_hidden_BCD = jnp.einsum("bcv,dv->bcd", d_logits_BCV, low_DV)
    return d_head_DV, (d_hidden_BCD, nll_BC, log_z_BC)

  chunks = _by_chunk(chunk, hidden_BTD, targets_BT, weights_BT)
  d_head_DV, outputs = jax.lax.scan(body, jnp.zeros(head_DV.shape, jnp.float32), chunks)
  d_hidden_BTD, nll_BT, log_z_BT = (_joined(x, targets_BT.shape[1]) for x in outputs)
  gradients = d_hidden_BTD, d_head_DV.astype(head_DV.dtype)
  return _totals(weights_BT, nll_BT, log_z_BT, z_loss), gradients


def _backward(
    z_loss: float, chunk: int, form: LogitForm, saved: tuple[Array, Array],
    gradients: tuple[Array, Array],
) -> tuple[Array, Array, None, None]:
  del z_loss, chunk, form
  d_hidden_BTD, d_head_DV = (
      (gradients[0] * gradient).astype(gradient.dtype) for gradient in saved
  )
  return d_hidden_BTD, d_head_DV, None, None


_summed.defvjp(_forward, _backward)
