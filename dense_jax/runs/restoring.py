"""A trained run, restored for evaluation, sampling or conversion."""

import dataclasses
import os

import jax

from dense_jax import experiment
from dense_jax.config import ExperimentConfig
from dense_jax.data.tokenizer import Tokenizer, load_saved_tokenizer
from dense_jax.errors import InputError
from dense_jax.files import make_path
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.runs.workdir import CHECKPOINTS, TOKENIZER
from dense_jax.training.checkpoint import Checkpoints, check_name, placed_on, saved_steps
from dense_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Run:
  """A run at one of its checkpoints.

  Attributes:
    config: the configuration with which the run was last trained.
    tokenizer: the run's tokenizer.
    model: holds the parameters; `model(tokens_BT)` returns logits.
    params: the same parameters by name, float32.
    step: updates done.
  """

  config: ExperimentConfig
  tokenizer: Tokenizer
  model: LanguageModel
  params: Params
  step: int


def restore(workdir: str | os.PathLike[str], checkpoint: str = "latest") -> Run:
  """Restores a run's parameters onto the first device; the run may be training at the same time.

  Args:
    workdir: the folder that training wrote, local or in a bucket.
    checkpoint: "latest", "best" (by held-out loss) or a step's number.

  Raises:
    InputError: there is no such run or checkpoint.
  """
  folder = make_path(os.fspath(workdir), "--workdir")
  check_name(folder, "--workdir")
  config = experiment.read(folder)
  if not saved_steps(folder / CHECKPOINTS):
    raise InputError(f"--workdir = {os.fspath(workdir)!r} is not valid: it has no checkpoints yet")
  model = abstract_model(config.model)
  shapes = placed_on(get_params(model), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  checkpoints = Checkpoints(folder / CHECKPOINTS, config.model, read_only=True)
  try:
    step, params = checkpoints.restore_params(shapes, checkpoint)
  finally:
    checkpoints.close()
  tokenizer = load_saved_tokenizer(folder / TOKENIZER)
  return Run(config, tokenizer, with_params(model, params), params, step)
