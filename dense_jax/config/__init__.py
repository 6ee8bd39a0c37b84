"""Configuration as frozen dataclasses that validate themselves.

Each field is declared once, with its default, its valid values and one line of meaning (`fields`).
`defaults` turns a dataclass into the nested dict that an experiment file edits (as an
`ml_collections.ConfigDict`), and `build` turns the edited dict back; its errors name the key, the
value and what would be valid. After `build`, a configuration is an object with typed attributes,
never a dict. One that Python code makes checks its fields in the same words (`Config`).
`dense_jax.cli.config_help` prints all keys, from the same fields.
"""

from dense_jax.config.build import build, defaults
from dense_jax.config.checked import Config, field_types
from dense_jax.config.data import DataConfig
from dense_jax.config.dense import DenseConfig
from dense_jax.config.eval import EvalConfig
from dense_jax.config.experiment import ExperimentConfig
from dense_jax.config.fields import (
  LARGEST,
  LARGEST_SEED,
  choice,
  flag,
  group,
  integer,
  invalid,
  number,
  text,
  unknown_key,
)
from dense_jax.config.guard import GuardConfig
from dense_jax.config.mesh import MeshConfig
from dense_jax.config.model import ModelConfig
from dense_jax.config.optimizer import OptimizerConfig
from dense_jax.config.task import TaskConfig
from dense_jax.config.train import TrainConfig
from dense_jax.config.watch import WatchConfig

__all__ = [
  "LARGEST", "LARGEST_SEED", "Config", "DataConfig", "DenseConfig", "EvalConfig",
  "ExperimentConfig", "GuardConfig", "MeshConfig", "ModelConfig", "OptimizerConfig", "TaskConfig",
  "TrainConfig", "WatchConfig", "build", "choice", "defaults", "field_types", "flag", "group",
  "integer", "invalid", "number", "text", "unknown_key",
]
