"""Runs as folders that others can load, and such folders as runs.

`publish` writes a checkpoint as a Hugging Face style folder: `config.json` and `model.safetensors`
(`dense_jax.interop.save_hf`), the tokenizer, a model card (`README.md`) and `training.json`:

    format_version   1
    step             updates done
    parameters       "raw", "ema" or "mean of steps ..."
    config           the run's configuration, but for `data.cache_dir`
    data             fingerprints and sizes of text and tokenizer, from data.json; or null
    heldout          the figures of the held-out text at that step, from metrics.jsonl; or null
    evaluation       the contents of files that the command `evaluate` wrote
    init             the model that the run began with, from init.json; or null

`make_run` inverts it: a run's folder with one checkpoint, of step 0 and without an optimizer.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from etils import epath

from dense_jax import experiment
from dense_jax.config import DataConfig, ExperimentConfig, defaults, invalid
from dense_jax.data.converted import converted_files
from dense_jax.errors import InputError
from dense_jax.files import make_path, parse_json, whole_folder, write_atomically
from dense_jax.interop.hugging_face import load_config
from dense_jax.interop.kinds import choose
from dense_jax.interop.save import save_hf
from dense_jax.models.params import as_scanned, by_layer, count_params
from dense_jax.outputs import check_destination
from dense_jax.runs import workdir as folders
from dense_jax.runs.card import CARD_FILE, is_evaluation, model_card
from dense_jax.runs.restoring import Run, load_folder
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.metrics import read_metrics
from dense_jax.training.step import TrainState

TRAINING_FILE = "training.json"
FORMAT_VERSION = 1
_HELDOUT = "heldout_"


@dataclasses.dataclass(frozen=True)
class Published:
  """A model that was written.

  Attributes:
    folder: its folder.
    layout: the name of the layout (`save_hf`).
    parameters: their number.
  """

  folder: pathlib.Path
  layout: str
  parameters: int


def publish(
    run: Run, workdir: str | os.PathLike[str], output: str, *,
    evaluation: Sequence[Mapping[str, Any]] = (), mean_of: Sequence[int] = (),
) -> Published:
  """Writes a run's model to a folder that others can load, with its tokenizer and a model card.

  Args:
    run: the run at a checkpoint, from `restore`, or with a mean of checkpoints as its parameters.
    workdir: its folder.
    output: the folder to write, a new or an empty one.
    evaluation: the contents of files that the command `evaluate` wrote.
    mean_of: the steps whose mean the parameters are; empty if they are no mean.

  Raises:
    InputError: the folder cannot be written.
  """
  folder = check_destination(output, "--output")
  record = _record(run, epath.Path(make_path(os.fspath(workdir), "--workdir")), mean_of)
  if evaluation:
    record["evaluation"] = [dict(each) for each in evaluation]
  layout, _, _ = choose(run.model.config)
  data = run.config.data
  files = converted_files(run.tokenizer, data.template if data.format == "responses" else "")
  size = count_params(run.params)
  config = experiment.resolve(record["config"])
  card = model_card(record, config, layout, size, files)
  files |= {TRAINING_FILE: _json(record), CARD_FILE: card.encode()}
  tokenizer = run.tokenizer
  save_hf(
      run.model, str(folder), bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
      files=files,
  )
  return Published(folder, layout, size)


def _json(record: Mapping[str, Any]) -> bytes:
  return (json.dumps(record, indent=2) + "\n").encode()


def _record(run: Run, folder: epath.Path, mean_of: Sequence[int]) -> dict[str, Any]:
  """Returns the content of `training.json`, without an evaluation."""
  before = read_training(folder)
  if before is not None:  # A run that `make_run` wrote has no history but this.
    return before
  parameters = run.weights
  if mean_of:
    parameters = f"mean of steps {', '.join(map(str, mean_of))}"
  scored = "ema" if run.config.train.ema else "raw"
  data = dataclasses.replace(run.config.data, cache_dir=DataConfig().cache_dir)
  return {
      "format_version": FORMAT_VERSION,
      "step": run.step,
      "parameters": parameters,
      "config": defaults(dataclasses.replace(run.config, data=data)),
      "data": _data(folder),
      "heldout": _heldout(folder, run.step) if parameters == scored else None,
      "evaluation": [],
      "init": _read(folder / folders.INIT_FILE),
  }


def _read(file: epath.Path) -> dict[str, Any] | None:
  """Reads an object from a file that is only described; None means that there is none."""
  try:
    values = parse_json(file.read_bytes())
  except (OSError, ValueError):
    return None
  return values if isinstance(values, dict) else None


def _data(folder: epath.Path) -> dict[str, Any] | None:
  """Returns what data.json says, without the names of files."""
  data = _read(folder / folders.DATA_FILE)
  if data is None or not isinstance(data.get("files"), dict):
    return data
  files = {
      field: {key: value for key, value in described.items() if key != "files"}
      for field, described in data["files"].items() if isinstance(described, dict)
  }
  return {**data, "files": files}


def _heldout(folder: epath.Path, step: int) -> dict[str, float] | None:
  figures: dict[str, float] = {}
  for record in read_metrics(folder):
    if record["step"] == step:
      figures |= {
          name.removeprefix(_HELDOUT): value
          for name, value in record.items() if name.startswith(_HELDOUT)
      }
  return figures or None


def read_training(folder: epath.Path) -> dict[str, Any] | None:
  """Reads the `training.json` of a folder; None means that it has none.

  Raises:
    InputError: the file is damaged or of another version.
  """
  file = folder / TRAINING_FILE
  if not file.is_file():
    return None
  try:
    record = parse_json(file.read_bytes())
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
      raise ValueError(f"its format_version is not {FORMAT_VERSION}")
    if not isinstance(record.get("config"), dict) or type(record.get("step")) is not int:
      raise ValueError("it has no step and configuration")
    lacking: dict[str, Any] = {"parameters": "raw", "evaluation": []}
    lacking |= dict.fromkeys(("data", "heldout", "init"))
    record |= {key: value for key, value in lacking.items() if key not in record}
    if not isinstance(record["evaluation"], list) or not all(
        map(is_evaluation, record["evaluation"])
    ):
      raise ValueError("its evaluation is none that evaluate wrote")
    return record
  except (OSError, ValueError) as error:
    raise InputError(
        f"{file} cannot be read: expected what convert writes there, or no such file ({error})"
    ) from error


def read_folder_config(path: str) -> ExperimentConfig:
  """Returns the configuration of a model in a Hugging Face style folder.

  It is that of the run which the model comes from, if `training.json` says it, and otherwise the
  default one with the model's.

  Raises:
    InputError: there is no model, or `training.json` is of another one than `config.json`.
  """
  folder = make_path(path, "--hf")
  model = load_config(path)
  record = read_training(folder)
  if record is None:
    return ExperimentConfig(model=dataclasses.replace(model, block_layers=0))
  try:
    config = experiment.resolve(record["config"])
  except (InputError, TypeError, AttributeError) as error:
    raise InputError(f"{folder / TRAINING_FILE} is not valid: {error}") from error
  if choose(config.model)[2].config != model:
    raise InputError(
        f"{folder / TRAINING_FILE} is of another model than config.json beside it: expected both "
        "as convert wrote them, or no training.json"
    )
  return config


def make_run(path: str, output: str) -> Published:
  """Makes a run's folder of a model in a Hugging Face style folder: the inverse of `publish`.

  The run has one checkpoint, of step 0 and without an optimizer. It can be evaluated, sampled from
  and converted, and training can begin with it (`--init-from`), but not go on in it.

  Args:
    path: a local folder with a model and its tokenizer.
    output: the folder to write, a new or an empty one.

  Raises:
    InputError: there is no such model, its numbers are not finite, or the folder cannot be written.
  """
  folder = check_destination(output, "--output")
  config = read_folder_config(path)
  loaded = load_folder(path, runs_model=False)
  params = as_scanned(config.model, by_layer(loaded.model.config, loaded.params))
  with whole_folder(folder) as partial:
    place = epath.Path(partial)
    checkpoints = Checkpoints(place / folders.CHECKPOINTS, config.model)
    try:
      saved = checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, {}), 0, {}, None)
    finally:
      checkpoints.close()
    if not saved:
      raise invalid("--hf", path, "a model whose parameters are finite; some of this one's are not")
    experiment.save(config, place)
    loaded.tokenizer.save(place / folders.TOKENIZER)
    training = pathlib.Path(make_path(path, "--hf")) / TRAINING_FILE
    if training.is_file():
      write_atomically(place / TRAINING_FILE, training.read_bytes())
  return Published(folder, "a run", count_params(params))
