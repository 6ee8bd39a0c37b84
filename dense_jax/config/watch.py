"""Signs of a run while it trains, beside its numbers: `config.watch`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import integer, invalid, text


@dataclasses.dataclass(frozen=True)
class WatchConfig(Config, key="config.watch"):
  """Signs of a run while it trains, beside its numbers (docs/reliability.md)."""

  hang_seconds: int = integer(
      1800, 0, help="seconds without a step after which the stacks of all threads are written into "
      "the run's folder; 0 means never")
  profile_from: int = integer(
      0, 0, help="the first step that jax.profiler records, into the run's folder; 0 means none, "
      "and 1 cannot be recorded, as it compiles")
  profile_steps: int = integer(3, 1, help="the steps that it records")
  wandb: str = text(
      "", "empty, or the name of a project", help="the Weights & Biases project that gets the "
      "metrics too (pip install -e '.[wandb]'); empty means none")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.profile_from == 1:
      raise invalid("config.watch.profile_from", 1, "0, or an integer >= 2")
