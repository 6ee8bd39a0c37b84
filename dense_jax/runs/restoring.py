"""A trained model, restored from a run or a folder for evaluation, sampling or conversion."""

import dataclasses
import os

import jax

from dense_jax import experiment
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.data.templates import Template, load_saved_template, template_of
from dense_jax.data.tokenizer import Tokenizer, load_saved_tokenizer
from dense_jax.errors import InputError
from dense_jax.files import make_path
from dense_jax.interop import load_hf
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.runs.kernels import check_kernels
from dense_jax.runs.workdir import CHECKPOINTS, TOKENIZER
from dense_jax.training.checkpoint import check_name
from dense_jax.training.checkpoint_reader import CheckpointReader
from dense_jax.training.host_arrays import placed_on
from dense_jax.training.stored import saved_steps
from dense_jax.types import Params


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model with its tokenizer.

  Attributes:
    name: says which model it is, such as "step 350 of runs/smoke".
    tokenizer: the model's tokenizer.
    model: holds the parameters; `model(tokens_BT)` returns logits.
    params: the same parameters by name, float32.
    template: the template in which the model was taught to answer prompts; None means that it
      continues texts as they are.
  """

  name: str
  tokenizer: Tokenizer
  model: LanguageModel
  params: Params
  template: Template | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Run(LoadedModel):
  """A run at one of its checkpoints.

  Attributes:
    config: the configuration with which the run was last trained.
    step: updates done.
    weights: "raw" if the parameters are those that were trained, "ema" if they are their average
      (`train.ema`).
  """

  config: ExperimentConfig
  step: int
  weights: str = "raw"


def restore(
    workdir: str | os.PathLike[str], checkpoint: str = "latest", weights: str = "auto", *,
    strict: bool = False, runs_model: bool = True,
) -> Run:
  """Restores a run's parameters onto the first device; the run may be training at the same time.

  Args:
    workdir: the folder that training wrote, local or in a bucket.
    checkpoint: "latest", "best" (by held-out loss) or a step's number.
    weights: "raw" for the parameters that were trained, "ema" for their average, or "auto" for the
      average if the run keeps one (`train.ema`), which is what evaluation during training scores.
    strict: see `dense_jax.runs.kernels.check_kernels`.
    runs_model: false if only the parameters are wanted, so that no kernel is tried out.

  Raises:
    InputError: there is no such run or checkpoint, no average in it, or it is damaged.
  """
  folder = make_path(os.fspath(workdir), "--workdir")
  check_name(folder, "--workdir")
  config = experiment.read(folder)
  if not saved_steps(folder / CHECKPOINTS):
    raise InputError(f"--workdir = {os.fspath(workdir)!r} is not valid: it has no checkpoints yet")
  if runs_model:
    check_kernels(config.model, strict=strict)
  model = abstract_model(config.model)
  shapes = placed_on(get_params(model), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  checkpoints = CheckpointReader(folder / CHECKPOINTS, config.model)
  step, params, weights = checkpoints.restore_params(shapes, checkpoint, weights)
  tokenizer = load_saved_tokenizer(folder / TOKENIZER)
  return Run(
      describe(step, weights, workdir), tokenizer, with_params(model, params), params, config, step,
      weights, template=template_of(config.data),
  )


def describe(step: int, weights: str, workdir: str | os.PathLike[str]) -> str:
  """Says which parameters of a run they are."""
  averaged = ", averaged (ema)" if weights == "ema" else ""
  return f"step {step} of {os.fspath(workdir)}{averaged}"


def load_folder(path: str, *, strict: bool = False, runs_model: bool = True) -> LoadedModel:
  """Loads a model and its tokenizer from a folder in a Hugging Face layout; see `load_hf`.

  Args:
    path: the folder.
    strict: see `dense_jax.runs.kernels.check_kernels`.
    runs_model: false if only the parameters are wanted, so that no kernel is tried out.

  Raises:
    InputError: the folder has no model, no tokenizer, or a damaged one.
  """
  model = load_hf(path)
  folder = make_path(path, "path")
  tokenizer = load_saved_tokenizer(folder)
  if tokenizer.vocab_size > model.config.vocab_size:
    raise invalid(
        "path", path, f"a tokenizer of at most {model.config.vocab_size} ids, the rows of the "
        f"model's embedding; it has {tokenizer.vocab_size}",
    )
  if runs_model and not check_kernels(model.config, strict=strict):
    model = with_params(abstract_model(model.config), get_params(model))
  template = load_saved_template(folder)
  return LoadedModel(path, tokenizer, model, get_params(model), template=template)
