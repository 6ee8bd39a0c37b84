"""Steps that would harm the run and are not taken: `config.guard`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import choice, integer, number


@dataclasses.dataclass(frozen=True)
class GuardConfig(Config, key="config.guard"):
  """Steps that are skipped, and what follows if one after the other is (docs/reliability.md).

  A skipped step leaves parameters, moments, averages and the schedule as they were; its batch is
  used up.
  """

  skip: str = choice(
      "nonfinite", "nonfinite", "spikes", "none",
      help="steps that are skipped: nonfinite means those whose loss or gradient is not finite; "
      "spikes also those whose loss or gradient norm is far above that of the steps before")
  sigmas: float = number(
      10.0, 0, open_low=True, help="with spikes: standard deviations above the mean of the window "
      "beyond which a step is skipped")
  window: int = integer(
      128, 8, help="with spikes: the last steps that were taken, of which mean and deviation are; "
      "none is a spike before there are so many")
  in_a_row: int = integer(
      10, 1, help="skipped steps in a row after which the run goes back to its newest checkpoint "
      "and passes over the batches since then")
  returns: int = integer(
      3, 0, help="returns to one checkpoint after which the run stops instead, with status 3")

  @property
  def is_on(self) -> bool:
    """True if any step may be skipped."""
    return self.skip != "none"
