"""Reading Hugging Face style checkpoints: `config.json` beside the tensors."""

import json
import pathlib
import pickle
from typing import Any

from dense_jax.interop.kinds import recognise
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.types import InputError


def load_hf(path: str) -> LanguageModel:
  """Loads a model from a folder in a known Hugging Face layout, or what `save_hf` wrote.

  Known are transformers' mamba, mamba2 and llama, the authors' DenseRetNet, and this
  project's own (`dense_jax.interop.dense`).

  Args:
    path: a folder with `config.json` and `model.safetensors`, or several shards with an
      index, or `pytorch_model.bin` (read with weights-only loading, if torch is there).

  Returns:
    A model that computes in float32 (in its own `dtype`, if it is of the own layout), every
    layer compiled apart: `model(tokens_BT) -> logits_BTV`, `model.init_state(batch_size)`,
    `model.step(state, tokens_B) -> (state, logits_BV)`.

  Raises:
    InputError: no such files, a layout that is not known, an option that no model here
      has, or tensors that are missing, extra or of another shape; it lists them all.
  """
  folder = pathlib.Path(path)
  config_file = folder / "config.json"
  if not config_file.is_file():
    raise InputError(f"{config_file} does not exist: expected a folder with config.json")
  try:
    config = json.loads(config_file.read_text())
  except json.JSONDecodeError as error:
    raise InputError(f"{config_file} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise InputError(f"{config_file} is not valid: expected an object of keys")
  layout = recognise(config)
  model = abstract_model(layout.config)
  return with_params(model, layout.to_ours(_read_tensors(folder), get_params(model)))


def _read_tensors(folder: pathlib.Path) -> dict[str, Any]:
  """All tensors of the folder, by name."""
  for name, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch)):
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
      return read(folder / name)
    if index.is_file():
      shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
      missing = [shard for shard in shards if not (folder / shard).is_file()]
      if missing:
        raise InputError(f"{index} names files that do not exist: {', '.join(missing)}")
      return {key: value for shard in shards for key, value in read(folder / shard).items()}
  raise InputError(
      f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, or their "
      "shards with an index"
  )


def _safetensors(file: pathlib.Path) -> dict[str, Any]:
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(file, framework="flax") as tensors:
      return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
  except SafetensorError as error:
    raise InputError(f"{file} is not a whole safetensors file: {error}") from error


def _torch(file: pathlib.Path) -> dict[str, Any]:
  try:
    import torch
  except ImportError as error:
    raise InputError(
        f"{file} needs PyTorch to be read: pip install 'dense_jax[interop]', or save the "
        "model as model.safetensors"
    ) from error
  try:
    tensors = torch.load(file, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError) as error:
    raise InputError(f"{file} is not a file of PyTorch weights alone: {error}") from error
  return {name: tensor.float().numpy() for name, tensor in tensors.items()}
