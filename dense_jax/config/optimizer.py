"""AdamW and its learning-rate schedule: `config.optimizer`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import choice, integer, invalid, number


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Config, key="config.optimizer"):
  """AdamW and its learning-rate schedule."""

  learning_rate: float = number(1e-3, 0, open_low=True, help="the peak, reached after warm-up")
  schedule: str = choice(
      "cosine", "cosine", "wsd", "polynomial", "constant",
      help="the learning rate after a linear warm-up; wsd means stable, then a linear decay")
  schedule_steps: int = integer(
      0, 0, help="updates over which the schedule extends; 0 means train.steps; beyond them the "
      "rate stays at its last value")
  warmup_fraction: float = number(0.05, 0, 1, help="warm-up, as a fraction of the schedule")
  decay_fraction: float = number(
      0.2, 0, 1, help="the decay of wsd, as a fraction of the schedule")
  power: float = number(1.0, 0, open_low=True, help="exponent of the polynomial schedule")
  final_fraction: float = number(
      0.1, 0, 1, help="the last learning rate, as a fraction of the peak")
  beta1: float = number(0.9, 0, 1, open_high=True, help="decay of AdamW's first moment")
  beta2: float = number(0.95, 0, 1, open_high=True, help="decay of AdamW's second moment")
  epsilon: float = number(1e-8, 0, open_low=True, help="AdamW's epsilon")
  weight_decay: float = number(
      0.1, 0, help="decoupled; dense_jax.training.optimizer says which parameters decay")
  clip_norm: float = number(
      1.0, 0, help="the gradient's global norm is clipped to it; 0 means no clipping")
  first_moment_dtype: str = choice(
      "float32", "float32", "bfloat16",
      help="dtype in which AdamW's first moment is kept between updates")
  second_moment_dtype: str = choice(
      "float32", "float32", "bfloat16",
      help="the same of its second moment; bfloat16 needs beta2 <= 0.99, as a moving average "
      "that changes by less than its last bit stands still")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.second_moment_dtype == "bfloat16" and self.beta2 > 0.99:
      raise invalid(
          "config.optimizer.second_moment_dtype", self.second_moment_dtype,
          f"float32 with beta2 = {self.beta2:g}, or beta2 <= 0.99",
      )
    if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
      raise invalid(
          "config.optimizer.decay_fraction", self.decay_fraction,
          f"a number <= 1 - warmup_fraction = {1 - self.warmup_fraction:g}",
      )

  def schedule_length(self, steps: int) -> int:
    """Returns the number of updates after which the rate is constant, in a run of `steps`."""
    return self.schedule_steps or steps

  def warmup_steps(self, steps: int) -> int:
    """Returns the number of updates of the linear warm-up, in a run of `steps`."""
    return round(self.warmup_fraction * self.schedule_length(steps))
