"""Reading Hugging Face style checkpoints: `config.json` beside the tensors."""

import pathlib
from typing import Any

from dense_jax.config import invalid
from dense_jax.errors import InputError
from dense_jax.files import is_remote, make_path, parse_json
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
  """Loads a model from a folder in a known Hugging Face layout, or what `save_hf` wrote.

  Known are transformers' mamba, mamba2 and llama, the authors' DenseRetNet, and this
  project's own (`dense_jax.interop.dense`).

  Args:
    path: a folder with `config.json` and `model.safetensors`, or several shards with an
      index, or `pytorch_model.bin` (read with weights-only loading, if torch is there). Of
      shards, each tensor is the one of the shard that the index names. A leading ~ is the home
      directory.

  Returns:
    A model that computes in float32 (in its own `dtype`, if it is of the own layout), every
    layer compiled apart: `model(tokens_BT) -> logits_BTV`, `model.init_state(batch_size)`,
    `model.step(state, tokens_B) -> (state, logits_BV)`.

  Raises:
    InputError: no such files, files that are damaged, a layout that is not known, an option
      that no model here has, or tensors that are missing, extra, of another shape or kind, or
      there twice and different; it lists them all.
  """
  place = make_path(path, "path")
  if is_remote(place):
    raise invalid("path", path, "a folder on this machine")
  folder = pathlib.Path(place)
  layout = recognise(_read_config(folder / "config.json"))
  model = abstract_model(unrolled_config(layout.config))
  expected = by_layer(model.config, get_params(model))
  params = layout.to_ours(read_tensors(folder), expected)
  return with_params(model, as_scanned(model.config, params))


def _read_config(file: pathlib.Path) -> dict[str, Any]:
  if not file.is_file():
    raise InputError(f"{file} does not exist: expected a folder with config.json")
  try:
    config = parse_json(file.read_bytes())
  except (OSError, ValueError) as error:
    raise InputError(f"{file} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise InputError(f"{file} is not valid: expected an object of keys")
  return config
