"""Held-out loss, perplexity and bits per byte."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from dense_jax import distributed, sharding
from dense_jax.batch import Batch
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import with_params
from dense_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Sums over the targets of an evaluation, and figures computed from them.

  Attributes:
    nats: negative log-likelihood of all targets. It may be infinite or NaN, and then so are the
      figures computed from it.
    targets: the number of targets.
    window: tokens of a row; None means that it is not known. Each row begins with a fresh state, so
      a target is predicted only from the tokens before it in its own row.
  """

  nats: float
  targets: int
  window: int | None = None

  @property
  def loss(self) -> float:
    """The mean loss, in nats per target."""
    return self.nats / self.targets

  @property
  def perplexity(self) -> float:
    """exp(loss), per token, so it depends on the tokenizer; infinite from 709.79 nats on."""
    try:
      return math.exp(self.loss)
    except OverflowError:
      return math.inf

  @property
  def context(self) -> str:
    """A few words on how the context of the targets was treated; "" if it is not known."""
    return "" if self.window is None else f"fresh every {self.window:,} tokens"

  def bits_per_byte(self, targets_per_byte: float | None) -> float | None:
    """Returns bits per byte of text, which do not depend on the tokenizer.

    Args:
      targets_per_byte: the number of targets per UTF-8 byte of the text; None if there is no text,
        and then there are no bits per byte.
    """
    return None if targets_per_byte is None else self.loss * targets_per_byte / math.log(2)

  def describe(self, bits_per_byte: float | None) -> str:
    """Returns one line of figures, and how the context was treated."""
    context = f" (context: {self.context})" if self.context else ""
    if not math.isfinite(self.loss):
      return f"held-out loss {self.loss}{context}"
    bits = "" if bits_per_byte is None else f", {fixed(bits_per_byte, 3)} bits/byte"
    return (
        f"held-out loss {fixed(self.loss, 4)} nats/token, perplexity "
        f"{fixed(self.perplexity, 2)}{bits}{context}"
    )


def fixed(value: float, digits: int) -> str:
  """Formats a number with `digits` decimals; from 1e7 on, with an exponent."""
  return f"{value:.{digits}f}" if abs(value) < 1e7 else f"{value:.3e}"


class Scorer:
  """Scores batches with a compiled step; the result does not depend on the batch size."""

  def __init__(self, model: LanguageModel, *, chunk: int) -> None:
    """Makes the step, which is compiled on first use.

    Args:
      model: the model, which may be abstract.
      chunk: tokens of a row whose logits exist at one time.
    """

    @sharding.sum_over_sequence
    def score(params: Params, batch: Batch) -> tuple[Array, Array]:
      nll_BT, _ = with_params(model, params).token_losses(batch, chunk=chunk)
      masked = jnp.where(batch.loss_mask_BT, nll_BT, 0.0)
      return jnp.sum(masked, axis=1), jnp.sum(batch.loss_mask_BT, axis=1, dtype=jnp.int32)

    self.score: Callable[[Params, Batch], tuple[Array, Array]] = jax.jit(score)

  def __call__(
      self, params: Params, batches: Iterable[Batch], put: Callable[[Batch], Batch]
  ) -> HeldOut:
    """Sums over host batches; the sums of rows are added in float64.

    Every row begins with a fresh state, and so does every document in it. If there are several
    processes, each passes its own rows, and all get the sums over all rows.

    Args:
      params: the model's parameters.
      batches: host batches.
      put: places a host batch on the devices.

    Raises:
      ValueError: the batches have no target.
    """
    nats, targets, window = 0.0, 0, None
    for batch in batches:
      with sharding.mesh_of(params):
        nll_B, targets_B = distributed.to_host(self.score(params, put(batch)))
      nats += float(nll_B.astype("float64").sum())
      targets += int(targets_B.sum())
      window = batch.tokens_BT.shape[1]
    if not targets:
      raise ValueError("no held-out targets: the held-out text has no token to predict")
    return HeldOut(nats, targets, window)
