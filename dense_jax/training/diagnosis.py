"""Finds out which layer's activations or gradients were the first that were not finite."""

import dataclasses
import math
import re

import jax

from dense_jax.training.step import Inside

_OF_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """The figures of a batch, and the first of them that is not finite.

  Attributes:
    first: a phrase that names it, such as "the activations of layer 2 (residual_rms)", in the order
      in which a step computes: activations from the first layer up, the loss, gradients from the
      last layer down. It says so if all are finite.
    loss: mean nats per target.
    activations: for each layer, its metrics by name.
    gradients: for each layer, the gradients' norms by the parameters' names within the layer.
    others: the norms of all other parameters' gradients by name.
  """

  first: str
  loss: float
  activations: list[dict[str, float]]
  gradients: list[dict[str, float]]
  others: dict[str, float]


def diagnose(inside: Inside) -> Diagnosis:
  """Reads the figures of a batch; see `Trainer.inside`."""
  values = jax.device_get(inside)
  activations = [{name: float(value) for name, value in sorted(aux.items())} for aux in values.aux]
  gradients: list[dict[str, float]] = [{} for _ in activations]
  others = {}
  for name, value in sorted(values.gradient_norms.items()):
    layer = _OF_LAYER.match(name)
    if layer:
      gradients[int(layer[1])][name[layer.end():]] = float(value)
    else:
      others[name] = float(value)
  loss = float(values.loss)
  return Diagnosis(
      _first(loss, activations, gradients, others), loss, activations, gradients, others
  )


def _first(
    loss: float, activations: list[dict[str, float]], gradients: list[dict[str, float]],
    others: dict[str, float],
) -> str:
  for layer, figures in enumerate(activations):
    if bad := _not_finite(figures):
      return f"the activations of layer {layer} ({bad})"
  if not math.isfinite(loss):
    return "the loss, although the activations of all layers are finite"
  # The embedding's gradient is the last one, also where it is the head's.
  above = {name: norm for name, norm in others.items() if name != "embedding"}
  if bad := _not_finite(above):
    return f"the gradients above the last layer ({bad})"
  for layer in reversed(range(len(gradients))):
    if bad := _not_finite(gradients[layer]):
      return f"the gradients of layer {layer} ({bad})"
  if bad := _not_finite(others):
    return f"the gradient of the {bad}"
  return "nothing, as loss, activations and gradients of the batch are finite"


def _not_finite(figures: dict[str, float]) -> str:
  return ", ".join(name for name, value in figures.items() if not math.isfinite(value))
