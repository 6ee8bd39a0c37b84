"""Cross-entropy against a large vocabulary without [B, T, V] logits."""

import functools

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import split_time
from dense_jax.types import Array


def token_cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
  """Negative log-likelihood of each target and log Z, float32, in nats."""
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return log_z - picked, log_z


def chunked_cross_entropy(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, *, chunk: int
) -> tuple[Array, Array]:
  """`token_cross_entropy(hidden @ head, targets)`, `chunk` tokens of a row at a time.

  The backward pass computes a chunk's logits again, so at most [B, chunk, V] exist.

  Args:
    hidden_BTD: the last norm's output, in the compute dtype.
    head_DV: the head; used in hidden's dtype, with float32 sums.
    targets_BT: int32.
    chunk: tokens of a row.

  Returns:
    nll_BT and log_z_BT, float32, in nats.
  """
  batch, time, _ = hidden_BTD.shape
  chex.assert_shape(targets_BT, (batch, time))
  chunk = min(chunk, time)
  head_DV = head_DV.astype(hidden_BTD.dtype)
  chunks_first = jax.tree.map(
      lambda x: jnp.moveaxis(split_time(x, chunk), 1, 0), (hidden_BTD, targets_BT)
  )

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def body(carry: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
    hidden_BCD, targets_BC = inputs
    logits_BCV = jnp.einsum(
        "bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32
    )
    return carry, token_cross_entropy(logits_BCV, targets_BC)

  _, outputs = jax.lax.scan(body, None, chunks_first)
  nll_BT, log_z_BT = (
      jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :time] for x in outputs
  )
  return nll_BT, log_z_BT
