"""The registry of model families, one line for each."""

import dataclasses

from dense_jax.config import invalid, unknown_key
from dense_jax.errors import InputError
from dense_jax.layers import attention, retnet, s4
from dense_jax.layers.attention import Attention, AttentionConfig
from dense_jax.layers.gau_retnet import GauRetNet, GauRetNetConfig
from dense_jax.layers.mamba import Mamba, MambaConfig
from dense_jax.layers.mamba2 import Mamba2, Mamba2Config
from dense_jax.layers.mixer import Mixer
from dense_jax.layers.retnet import RetNet, RetNetConfig
from dense_jax.layers.s4 import S4, S4D, S4Config, S4DConfig
from dense_jax.layers.stack import FeedForwardFactory


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models.

  Attributes:
    config: the class of the family's own options, `config.model.mixer`.
    mixer: the class of its mixer.
    feed_forward: makes the layer that follows each mixer; None means none.
  """

  config: type
  mixer: type[Mixer]
  feed_forward: FeedForwardFactory | None = None

  @property
  def form(self) -> str:
    """The form of the mixer's state, a key of `dense_jax.ops.resolver.IMPLEMENTATIONS`."""
    return self.mixer.form


FAMILIES = {
    "mamba": Family(MambaConfig, Mamba),
    "mamba2": Family(Mamba2Config, Mamba2),
    "gau_retnet": Family(GauRetNetConfig, GauRetNet),
    "retnet": Family(RetNetConfig, RetNet, retnet.feed_forward),
    "s4d": Family(S4DConfig, S4D, s4.feed_forward),
    "s4": Family(S4Config, S4, s4.feed_forward),
    "transformer": Family(AttentionConfig, Attention, attention.feed_forward),
}


def family(name: str) -> Family:
  """Returns the family of that name.

  Raises:
    InputError: no family has that name.
  """
  if not isinstance(name, str):  # From a damaged config.json.
    raise invalid("config.model.family", name, f"one of {', '.join(FAMILIES)}")
  if name not in FAMILIES:
    near = unknown_key(name, list(FAMILIES))
    raise InputError(f"config.model.family = {name!r} is not valid: {near}")
  return FAMILIES[name]
