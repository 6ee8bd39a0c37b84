"""The training loss."""

import jax.numpy as jnp

from dense_jax.batch import Batch
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Array


def loss_sum(
    model: LanguageModel, batch: Batch, *, z_loss: float, chunk: int
) -> tuple[Array, Array]:
  """Returns the sums of the objective and of the cross-entropy over the batch's targets, in nats.

  The objective is cross-entropy + z_loss * (log Z)^2 for each target (arXiv 2204.02311,
  section 5). Targets that `batch.loss_mask_BT` excludes do not count.

  Args:
    model: the model.
    batch: tokens and targets [B, T].
    z_loss: the coefficient of (log Z)^2; 0 turns it off.
    chunk: see `LanguageModel.token_losses`.

  Returns:
    Two float32 scalars: the objective, which is differentiated, and the cross-entropy in it.
  """
  nll_BT, log_z_BT = model.token_losses(batch, chunk=chunk)
  mask_BT = batch.loss_mask_BT.astype(jnp.float32)
  nll = jnp.sum(nll_BT * mask_BT)
  return nll + z_loss * jnp.sum(log_z_BT**2 * mask_BT), nll
