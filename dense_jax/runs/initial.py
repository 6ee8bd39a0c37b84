"""The model with which a run begins: another run's, or one in a Hugging Face layout.

`init.json` in the run's folder says which model it was. A run that goes on does not need it again.
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dense_jax import experiment
from dense_jax.config import ExperimentConfig, MeshConfig, ModelConfig, defaults, invalid
from dense_jax.data.tokenizer import Tokenizer, load_saved_tokenizer
from dense_jax.errors import InputError
from dense_jax.files import make_path, parse_json
from dense_jax.models.params import abstract_model
from dense_jax.models.warm_start import new_parameters
from dense_jax.runs import publishing
from dense_jax.runs import workdir as folders
from dense_jax.runs.restoring import LoadedModel, describe, load_folder
from dense_jax.training.checkpoint import check_name
from dense_jax.training.checkpoint_reader import CheckpointReader
from dense_jax.training.step import placed_shapes
from dense_jax.training.stored import saved_steps
from dense_jax.types import Params

FLAG = "--init-from"


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """Names the model with which a run begins.

  Attributes:
    path: a run's folder, or a local folder in a Hugging Face layout with its tokenizer.
    checkpoint: of a run: "latest", "best" (by held-out loss) or a step's number.
    weights: of a run: "raw", "ema", or "auto" for the average if there is one.
  """

  path: str
  checkpoint: str = "latest"
  weights: str = "auto"


@dataclasses.dataclass(frozen=True)
class Source:
  """A model with which a run can begin.

  Attributes:
    init: the name that it was given by.
    folder: its folder.
    model: its configuration.
    tokenizer: its tokenizer.
    loaded: its parameters, if they come from a Hugging Face folder; None for a run, whose
      parameters are read onto the mesh at once.
  """

  init: InitFrom
  folder: epath.Path
  model: ModelConfig
  tokenizer: Tokenizer
  loaded: LoadedModel | None

  def load(self, mesh: Mesh) -> tuple[str, Params]:
    """Reads the parameters onto a mesh; returns what they are, and them.

    Raises:
      InputError: there is no such checkpoint, or the mesh does not divide a parameter.
    """
    shapes = placed_shapes(abstract_model(self.model), mesh)
    if self.loaded is not None:
      return self.init.path, {
          name: _placed(np.asarray(leaf), shapes[name])
          for name, leaf in self.loaded.params.items()
      }
    checkpoints = CheckpointReader(self.folder / folders.CHECKPOINTS, self.model)
    step, params, weights = checkpoints.restore_params(
        shapes, self.init.checkpoint, self.init.weights
    )
    return describe(step, weights, self.init.path), params

  def record(self, name: str, target: ModelConfig) -> dict[str, Any]:
    """Returns what `init.json` says: JSON values.

    Args:
      name: what the parameters are, from `load`.
      target: the model of the run that begins.
    """
    copied, new = new_parameters(self.model, target)
    return {
        "source": self.init.path,
        "model": name,
        "copied": copied,
        "new": new,
        "vocab_size": self.model.vocab_size,
        "tokenizer": self.tokenizer.fingerprint,
        "dense": defaults(self.model.dense),
    }


def _placed(array: np.ndarray, shape: Any) -> jax.Array:
  """Places an array that every process holds; each device takes its part."""
  return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: array[index])


def find_source(init: InitFrom) -> Source:
  """Finds the model that is named, with its tokenizer.

  Raises:
    InputError: there is no such model, or a checkpoint is chosen in a folder that has no runs.
  """
  folder = _folder(init)
  if _is_run(folder):
    check_name(folder, FLAG)
    config = experiment.read(folder)
    if not saved_steps(folder / folders.CHECKPOINTS):
      raise invalid(FLAG, init.path, "a run that has a checkpoint; it has none yet")
    tokenizer = load_saved_tokenizer(folder / folders.TOKENIZER)
    return Source(init, folder, config.model, tokenizer, None)
  default = InitFrom(init.path)
  for option, value, usual in (("--init-checkpoint", init.checkpoint, default.checkpoint),
                               ("--init-weights", init.weights, default.weights)):
    if value != usual:
      raise invalid(option, value, f"no value with {FLAG} {init.path}, which is no run")
  loaded = load_folder(init.path, runs_model=False)
  return Source(init, folder, loaded.model.config, loaded.tokenizer, loaded)


def _folder(init: InitFrom) -> epath.Path:
  folder = make_path(init.path, FLAG)
  if not folder.is_dir():
    raise invalid(
        FLAG, init.path, "a run's folder, or a local folder with config.json and model.safetensors"
    )
  return folder


def _is_run(folder: epath.Path) -> bool:
  """Returns whether a folder is a run's, of which only some have all keys of a configuration."""
  return (folder / folders.CHECKPOINTS).is_dir() or folders.holds_run(folder)


def base_config(workdir: str | os.PathLike[str], init: InitFrom | None) -> ExperimentConfig:
  """Returns the configuration to change where no experiment is named.

  It is that of the run in the folder, or else that of the model to begin with: its run's, as far as
  that is known, with the source's tokenizer and one device.

  Raises:
    InputError: there is neither.
  """
  folder = make_path(os.fspath(workdir), "--workdir")
  if saved_steps(folder / folders.CHECKPOINTS):
    return experiment.read(folder)
  if init is None:
    raise InputError(
        "--config is missing: expected an experiment, FILE.py[:ARG]; only where --workdir holds a "
        f"run, or with {FLAG}, its configuration is taken instead"
    )
  source = _folder(init)
  is_run = _is_run(source)
  config = experiment.read(source) if is_run else publishing.read_folder_config(init.path)
  return dataclasses.replace(
      config, mesh=MeshConfig(), data=dataclasses.replace(config.data, tokenizer="train")
  )


@dataclasses.dataclass(frozen=True)
class Beginning:
  """The model with which a run began or is to begin, as far as the run needs to know it.

  Attributes:
    source: the model; None if the run goes on from its own checkpoint.
    tokenizer: the model's tokenizer.
    vocab_size: rows of the model's embedding.
    record: the content of `init.json`, for a run that goes on.
  """

  source: Source | None
  tokenizer: Tokenizer
  vocab_size: int
  record: dict[str, Any]


def beginning(workdir: epath.Path, init: InitFrom | None) -> Beginning | None:
  """Returns with which model the run in a folder began or is to begin; None means fresh parameters.

  Args:
    workdir: the run's folder. If it has a checkpoint, what it was begun with is final, and `init`
      may be left out.
    init: the model to begin with.

  Raises:
    InputError: the run began otherwise, or there is no such model.
  """
  if not saved_steps(workdir / folders.CHECKPOINTS):
    if init is None:
      return None
    source = find_source(init)
    return Beginning(source, source.tokenizer, source.model.vocab_size, {})
  file = workdir / folders.INIT_FILE
  if not file.is_file():
    if init is not None:
      raise invalid(FLAG, init.path, "no value, or another --workdir: the run in this one began "
                    "with fresh parameters and goes on from its checkpoint")
    return None
  record = _read_record(file)
  if init is not None and not _same_path(init.path, record["source"]):
    raise invalid(FLAG, init.path, f"{record['source']} or no value, or another --workdir: the run "
                  f"in this one began with {record['model']} and goes on from its checkpoint")
  tokenizer = load_saved_tokenizer(workdir / folders.TOKENIZER)
  return Beginning(None, tokenizer, record["vocab_size"], record)


def _read_record(file: epath.Path) -> dict[str, Any]:
  try:
    record = parse_json(file.read_bytes())
    if not isinstance(record["source"], str) or not isinstance(record["vocab_size"], int):
      raise ValueError("it names no source and vocabulary")
    return {"model": record["source"], **record}
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise InputError(
        f"{file} cannot be read: expected what the run wrote when it began with another model "
        f"({error})"
    ) from error


def _same_path(given: str, recorded: str) -> bool:
  one, other = (os.path.abspath(os.path.expanduser(path)) for path in (given, recorded))
  return one == other
