"""The training loss."""

import jax.numpy as jnp

from dense_jax.batch import Batch
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Array


def loss_sum(
    model: LanguageModel, batch: Batch, *, z_loss: float, chunk: int
) -> tuple[Array, Array]:
  """Summed over the batch's targets: the objective, and the cross-entropy in it, in nats.

  The objective is cross-entropy + z_loss * (log Z)^2 for each target (arXiv 2204.02311,
  section 5); both sums are float32.
  """
  nll_BT, log_z_BT = model.token_losses(batch, chunk=chunk)
  mask_BT = batch.loss_mask_BT.astype(jnp.float32)
  nll = jnp.sum(nll_BT * mask_BT)
  return nll + z_loss * jnp.sum(log_z_BT**2 * mask_BT), nll
