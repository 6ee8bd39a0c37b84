"""The complete configuration of a run: `config`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.data import DataConfig
from dense_jax.config.eval import EvalConfig
from dense_jax.config.fields import LARGEST_SEED, group, integer
from dense_jax.config.guard import GuardConfig
from dense_jax.config.mesh import MeshConfig
from dense_jax.config.model import ModelConfig
from dense_jax.config.optimizer import OptimizerConfig
from dense_jax.config.train import TrainConfig
from dense_jax.config.watch import WatchConfig


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Config, key="config"):
  """The complete configuration of a run, which an experiment file edits."""

  seed: int = integer(
      0, 0, LARGEST_SEED, help="of the parameters' initial values and of the order of the rows")
  model: ModelConfig = group(ModelConfig, help="the language model")
  data: DataConfig = group(DataConfig, help="text, tokens and rows")
  optimizer: OptimizerConfig = group(
      OptimizerConfig, help="AdamW and its learning-rate schedule")
  train: TrainConfig = group(TrainConfig, help="the training run")
  guard: GuardConfig = group(
      GuardConfig, help="steps that would harm the run, and are skipped")
  watch: WatchConfig = group(
      WatchConfig, help="signs of a run while it trains, beside its numbers")
  eval: EvalConfig = group(EvalConfig, help="tasks that are scored during training")
  mesh: MeshConfig = group(
      MeshConfig, help="devices by axis; one size may be -1, which takes the devices that are left")
