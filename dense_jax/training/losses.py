"""The training loss."""

import jax.numpy as jnp

from dense_jax.batch import Batch
from dense_jax.layers.metrics import Aux
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Array


def loss_sum(
    model: LanguageModel, batch: Batch, *, z_loss: float, chunk: int, measure: bool = False
) -> tuple[Array, Array, list[Aux]]:
  """Sums the objective, and the cross-entropy in it, over a batch's targets, in nats.

  The objective is cross-entropy + z_loss * (log Z)^2 for each target (arXiv 2204.02311,
  section 5).

  Args:
    model: a model that holds parameters.
    batch: rows of tokens; targets outside its loss mask are left out.
    z_loss: the weight of (log Z)^2.
    chunk: tokens of a row whose logits exist at one time.
    measure: collects each layer's metrics.

  Returns:
    Both sums, float32 scalars, and each layer's metrics, which are empty without `measure`.
  """
  nll_BT, log_z_BT, aux = model.measured_losses(batch, chunk=chunk, measure=measure)
  mask_BT = batch.loss_mask_BT.astype(jnp.float32)
  nll = jnp.sum(nll_BT * mask_BT)
  return nll + z_loss * jnp.sum(log_z_BT**2 * mask_BT), nll, aux
