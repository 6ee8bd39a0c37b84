"""The families of models: one line each."""

import dataclasses
from collections.abc import Callable

from flax import nnx

from dense_jax.config import ModelConfig, unknown_key
from dense_jax.layers.attention import Attention, AttentionConfig, feed_forward
from dense_jax.layers.feed_forward import FeedForward
from dense_jax.layers.gau_retnet import GauRetNet, GauRetNetConfig
from dense_jax.layers.mamba import Mamba, MambaConfig
from dense_jax.layers.mixer import Mixer
from dense_jax.types import InputError


def _none(config: ModelConfig, rngs: nnx.Rngs) -> None:
  del config, rngs


@dataclasses.dataclass(frozen=True)
class Family:
  """A family.

  Attributes:
    config: its own options (`config.model.mixer`).
    mixer: makes its mixer.
    form: its state's form.
    feed_forward: makes the layer that follows each mixer; None where there is none.
  """

  config: type
  mixer: Callable[..., Mixer]
  form: str
  feed_forward: Callable[[ModelConfig, nnx.Rngs], FeedForward | None] = _none


FAMILIES = {
    "mamba": Family(MambaConfig, Mamba, "diagonal"),
    "gau_retnet": Family(GauRetNetConfig, GauRetNet, "matrix"),
    "transformer": Family(AttentionConfig, Attention, "attention", feed_forward),
}


def family(name: str) -> Family:
  """The family of that name.

  Raises:
    InputError: there is none.
  """
  if name not in FAMILIES:
    near = unknown_key(name, list(FAMILIES))
    raise InputError(f"config.model.family = {name!r} is not valid: {near}")
  return FAMILIES[name]
