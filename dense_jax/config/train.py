"""The training run: `config.train`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import integer, invalid, number


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config, key="config.train"):
  """The training run."""

  steps: int = integer(1000, 1, help="optimizer updates in all")
  batch_size: int = integer(
      8, 1, help="rows of an update, over all devices and accumulation steps")
  accumulate: int = integer(
      1, 1, help="parts in which a batch is computed, one after the other; divides batch_size")
  z_loss: float = number(
      0.0, 0, help="weight of mean(log Z ** 2) in the loss, which keeps logits from drifting; 0 "
      "means none")
  ema: float = number(
      0.0, 0, 1, open_high=True, help="decay of an exponential moving average of the parameters, "
      "which evaluation then takes instead of them (docs/publishing.md); 0 keeps none")
  loss_chunk: int = integer(256, 1, help="tokens of a row whose logits exist at one time")
  log_every: int = integer(10, 1, help="steps between logged losses; the last step is logged")
  layer_metrics_every: int = integer(
      0, 0, help="steps between numbers from inside the layers; 0 means never")
  eval_every: int = integer(
      500, 1, help="steps between evaluations on held-out text; the last step is evaluated")
  eval_batches: int = integer(
      16, 0, help="held-out batches of an evaluation during training; 0 means all")
  checkpoint_every: int = integer(
      500, 1, help="steps between checkpoints; the last step is saved")
  checkpoint_minutes: float = number(
      0.0, 0, help="also save once so many minutes have passed since the last save, as steps of "
      "unknown length may lie far apart; 0 means never")
  keep_last: int = integer(2, 1, help="newest checkpoints that are kept")
  keep_best: int = integer(1, 0, help="checkpoints of the lowest held-out loss that are kept")
  keep_every: int = integer(
      0, 0, help="keep the checkpoints whose step is a multiple of this besides; 0 means none")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.batch_size % self.accumulate:
      raise invalid(
          "config.train.accumulate", self.accumulate,
          f"a divisor of train.batch_size = {self.batch_size}",
      )
