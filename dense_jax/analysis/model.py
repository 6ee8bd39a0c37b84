"""Looks into a model: states, residual streams, gradients, gates and early predictions."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.analysis.representations import (
    Features,
    cosine_similarity,
    effective_rank,
    gaussian_information,
    linear_cka,
    probe_recovery,
)
from dense_jax.batch import Batch
from dense_jax.errors import InputError
from dense_jax.layers.observation import Observer, observing
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import (
    abstract_model,
    as_scanned,
    by_layer,
    get_params,
    unrolled_config,
    with_params,
)
from dense_jax.ops.cross_entropy import token_cross_entropy
from dense_jax.types import Array

_LOSS_CHUNK = 256
_LEAST_SAMPLES = 32  # Four of each component in `gaussian_information`.


@dataclasses.dataclass(frozen=True)
class Seen:
  """The figures of a model's layers on some rows of text. L is the number of layers.

  Attributes:
    similarity: kind ("state" or "residual") -> name of a figure of two layers -> [L, L]. Row i,
      column j of "probe" is how much of layer i is recovered from layer j.
    rank: kind -> effective rank of each layer, [L].
    lens: mean loss in nats per target if the final norm and head follow layer i at once, [L].
    gradient, cut_gradient: [L, L]; row j, column i is the norm of the gradient that reaches the
      residual stream after layer i from that after layer j, over the norm at j; 0 for i > j. In
      `cut_gradient` none passes through dense connections.
    layers: for each layer, its metrics, such as gates and each source's share of the read
      (`dense_jax.layers.metrics`).
    loss_at: mean loss in nats of the targets at each position of a row, [T]; NaN where none is.
    targets_at: the number of targets at each position, [T].
    samples: tokens that states and residual streams were taken at.
  """

  similarity: dict[str, dict[str, np.ndarray]]
  rank: dict[str, np.ndarray]
  lens: np.ndarray
  gradient: np.ndarray
  cut_gradient: np.ndarray
  layers: list[dict[str, float]]
  loss_at: np.ndarray
  targets_at: np.ndarray
  samples: int

  def as_dict(self) -> dict[str, Any]:
    """Returns the figures as JSON values."""
    return jax.tree.map(
        lambda leaf: leaf.tolist() if isinstance(leaf, np.ndarray) else leaf,
        {field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
    )


def observable(model: LanguageModel) -> LanguageModel:
  """Returns the same function with its layers compiled apart, and nothing computed again."""
  config = dataclasses.replace(unrolled_config(model.config), remat="none")
  params = as_scanned(config, by_layer(model.config, get_params(model)))
  return with_params(abstract_model(config), params)


def look_into(
    model: LanguageModel, batches: Iterable[Batch], *, samples: int = 1024, seed: int = 0
) -> Seen:
  """Computes all figures of a model.

  Args:
    model: a model that holds parameters, in any form.
    batches: rows of text, all of one shape. Each is seen as a whole; states are taken at random
      tokens of it.
    samples: the number of tokens to take states at, over all batches.
    seed: of the choice of tokens, and of the directions of gradients.

  Raises:
    InputError: the rows have too few targets.
  """
  model = observable(model)
  rows = list(batches)
  counts = [min(int(np.sum(batch.loss_mask_BT)), -(-samples // len(rows))) for batch in rows]
  if sum(counts) < _LEAST_SAMPLES:
    raise InputError(
        f"{sum(counts)} tokens with a target can be taken of {len(rows)} batches: expected at "
        f"least {_LEAST_SAMPLES}, of more rows, longer ones, or with more samples"
    )
  random = np.random.default_rng(seed)
  taken: dict[str, list[list[np.ndarray]]] = {"state": [], "residual": []}
  metrics, losses, targets = [], [], []
  for batch, count in zip(rows, counts, strict=True):
    valid = np.flatnonzero(np.asarray(batch.loss_mask_BT))
    places = np.sort(random.choice(valid, count, replace=False))
    states, residuals, aux, nll_LBT = _look(model, batch, jnp.asarray(places))
    taken["state"].append([np.asarray(each) for each in states])
    taken["residual"].append([np.asarray(each) for each in residuals])
    metrics.append(jax.device_get(aux))
    losses.append(np.where(batch.loss_mask_BT, nll_LBT, 0).sum(axis=1))
    targets.append(np.asarray(batch.loss_mask_BT).sum(axis=0))
  # Gradients differ little from row to row, and take L backward passes.
  whole, cut = (
      np.asarray(_gradients(model, rows[0], jax.random.key(seed), cut=cut)) for cut in (False, True)
  )
  loss_LT, targets_T = np.sum(losses, axis=0), np.sum(targets, axis=0)
  joined = {
      kind: [Features(np.concatenate(parts)) for parts in zip(*of_rows, strict=True)]
      for kind, of_rows in taken.items() if of_rows[0]
  }
  return Seen(
      similarity={kind: _similarities(layers) for kind, layers in joined.items()},
      rank={kind: np.array([effective_rank(x) for x in layers]) for kind, layers in joined.items()},
      lens=loss_LT.sum(axis=1) / targets_T.sum(), gradient=whole, cut_gradient=cut,
      layers=[
          {name: float(np.mean([of_row[i][name] for of_row in metrics])) for name in layer}
          for i, layer in enumerate(metrics[0])
      ],
      loss_at=np.where(targets_T, loss_LT[-1] / np.maximum(targets_T, 1), np.nan),
      targets_at=targets_T,
      samples=len(joined["residual"][0].x_SF),
  )


def _similarities(layers: Sequence[Features]) -> dict[str, np.ndarray]:
  """Compares all pairs of layers."""
  figures = {
      "cosine": cosine_similarity, "cka": linear_cka, "information": gaussian_information,
      "probe": lambda x, y: probe_recovery(y, x),
  }
  same_width = len({x.x_SF.shape[1] for x in layers}) == 1
  return {
      name: np.array([[figure(x, y) for y in layers] for x in layers])
      for name, figure in figures.items() if name != "cosine" or same_width
  }


@jax.jit
def _look(
    model: LanguageModel, batch: Batch, places: Array
) -> tuple[list[Array], list[Array], list[dict[str, Array]], Array]:
  """Returns states and residual streams at places of the flattened batch, metrics, and losses.

  The losses, [L, B, T], are those if the final norm and head follow each layer at once.
  """

  def taken(value: Array) -> Array:
    batch_size, time = batch.tokens_BT.shape
    return value.reshape(batch_size * time, -1)[places].astype(jnp.float32)

  with observing(Observer(wanted=frozenset({"state"}))) as observer:
    _, _, aux = model.summed_losses(batch, z_loss=0.0, chunk=_LOSS_CHUNK, measure=True)
  residuals = observer.seen["residual"]
  states = [taken(value) for value in observer.seen.get("state", [])]

  def losses_after(x_BTD: Array) -> Array:
    logits_BTV = model.logits(model.norm(x_BTD))
    return token_cross_entropy(logits_BTV, batch.targets_BT)[0]

  nll_LBT = jnp.stack([losses_after(x_BTD) for x_BTD in residuals])
  return states, [taken(x) for x in residuals], aux, nll_LBT


@functools.partial(jax.jit, static_argnames="cut")
def _gradients(model: LanguageModel, batch: Batch, key: Array, *, cut: bool) -> Array:
  """Returns the norms of gradients between layers, [from, to]; see `Seen`."""
  layers = model.config.layers
  shape = (*batch.tokens_BT.shape, model.config.width)

  def residuals(added: tuple[Array, ...]) -> Array:
    with observing(Observer(added=added, cut=cut)) as observer:
      model.hidden(batch.tokens_BT, batch.segments)
    return jnp.stack(observer.seen["residual"]).astype(jnp.float32)

  zeros = tuple(jnp.zeros(shape, model.dtype) for _ in range(layers))
  _, pull = jax.vjp(residuals, zeros)

  def norms(layer: Array) -> Array:
    direction = jax.random.normal(jax.random.fold_in(key, layer), shape)
    direction = direction / jnp.linalg.norm(direction)
    (reached,) = pull(jnp.zeros((layers, *shape)).at[layer].set(direction))
    return jnp.stack([jnp.linalg.norm(each.astype(jnp.float32)) for each in reached])

  return jax.lax.map(norms, jnp.arange(layers))
