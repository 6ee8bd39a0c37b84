"""Reads Hugging Face style checkpoints: a folder with `config.json` and the tensors."""

import pathlib
from typing import Any

from dense_jax.config import ModelConfig, invalid
from dense_jax.errors import InputError
from dense_jax.files import is_remote, make_path, read_object
from dense_jax.interop.kinds import recognise
from dense_jax.interop.weights import read_tensors
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import (
    abstract_model,
    as_scanned,
    by_layer,
    get_params,
    unrolled_config,
    with_params,
)


def load_hf(path: str) -> LanguageModel:
  """Loads a model from a folder in a known Hugging Face layout, such as `save_hf` writes.

  The known layouts are transformers' mamba, mamba2 and llama, the authors' DenseRetNet, and this
  project's own (`dense_jax.interop.native`).

  Args:
    path: a local folder with `config.json` and either `model.safetensors` or `pytorch_model.bin`,
      or the shards of one of them with their index. `pytorch_model.bin` needs torch, and is read
      with weights-only loading. A tensor is read from the shard that the index names, even if
      other shards hold it too. A leading ~ is the home directory.

  Returns:
    A model with parameters in float32, whose layers are not scanned:
    `model(tokens_BT) -> logits_BTV`, `model.init_state(batch_size)`,
    `model.step(state, tokens_B) -> (state, logits_BV)`. It computes in float32, or, in this
    project's own layout, in the `dtype` of its configuration.

  Raises:
    InputError: the files do not exist or are damaged, the layout is not known, an option has no
      counterpart here, or tensors are missing, extra, of another shape or dtype, or differ from
      a tensor that should be equal; the error lists all such tensors.
  """
  folder = _local(path)
  layout = recognise(read_config(folder))
  model = abstract_model(unrolled_config(layout.config))
  expected = by_layer(model.config, get_params(model))
  params = layout.to_ours(read_tensors(folder), expected)
  return with_params(model, as_scanned(model.config, params))


def load_config(path: str) -> ModelConfig:
  """Reads the configuration of the model in a folder; see `load_hf`.

  Raises:
    InputError: there is no `config.json`, it is damaged, or its layout is not known.
  """
  return recognise(read_config(_local(path))).config


def _local(path: str) -> pathlib.Path:
  place = make_path(path, "path")
  if is_remote(place):
    raise invalid("path", path, "a folder on this machine")
  return pathlib.Path(place)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Reads a folder's `config.json`, an object of keys.

  Raises:
    InputError: it does not exist or is damaged.
  """
  file = folder / "config.json"
  if not file.is_file():
    raise InputError(f"{file} does not exist: expected a folder with config.json")
  return read_object(file, "an object of keys")
