"""Reading Hugging Face style checkpoints: `config.json` beside the tensors."""

import json
import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dense_jax.interop import dense_retnet
from dense_jax.interop.layout import Layout, Tensor
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.types import InputError, Params

# Each says whether a config.json is of its layout, and describes it.
LAYOUTS: tuple[Callable[[Mapping[str, Any]], Layout | None], ...] = (dense_retnet.layout,)


def load_hf(path: str) -> LanguageModel:
  """Loads a model from a folder in a known Hugging Face layout.

  Args:
    path: a folder with `config.json` and `model.safetensors`, or several shards with an
      index, or `pytorch_model.bin` (read with weights-only loading, if torch is there).

  Returns:
    A float32 model: `model(tokens_BT) -> logits_BTV`, `model.init_state(batch_size)`,
    `model.step(state, tokens_B) -> (state, logits_BV)`.

  Raises:
    InputError: no such files, a layout that is not known, or tensors that are missing,
      extra or of another shape; it lists them all.
  """
  folder = pathlib.Path(path)
  config_file = folder / "config.json"
  if not config_file.is_file():
    raise InputError(f"{config_file} does not exist: expected a folder with config.json")
  try:
    config = json.loads(config_file.read_text())
  except json.JSONDecodeError as error:
    raise InputError(f"{config_file} is not JSON: {error}") from error
  for make in LAYOUTS:
    layout = make(config)
    if layout is not None:
      break
  else:
    raise InputError(
        f"{config_file}: model_type {config.get('model_type')!r} is not of a known layout: "
        "expected DenseRetNet (query_key_dim, v_factor and dense_block_layers)"
    )
  model = abstract_model(layout.config)
  return with_params(model, _convert(layout, _read_tensors(folder), get_params(model)))


def _read_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
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


def _safetensors(file: pathlib.Path) -> dict[str, Tensor]:
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(file, framework="flax") as tensors:
      return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
  except SafetensorError as error:
    raise InputError(f"{file} is not a whole safetensors file: {error}") from error


def _torch(file: pathlib.Path) -> dict[str, Tensor]:
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


def _convert(layout: Layout, tensors: Mapping[str, Tensor], expected: Params) -> Params:
  """The tensors as our parameters.

  Raises:
    InputError: naming every tensor that is missing, extra, or of another shape.
  """
  problems = [
      f"missing: {name}" for name in layout.names.values() if name not in tensors
  ]
  known = set(layout.names.values()) | layout.unused
  problems += [f"extra: {name}" for name in sorted(tensors) if name not in known]
  params = {}
  for ours, theirs in layout.names.items():
    if theirs not in tensors:
      continue
    value = jnp.asarray(np.asarray(tensors[theirs]), jnp.float32)
    if value.ndim == 2 and ours != "embedding":
      value = value.T  # PyTorch keeps linear maps as [out, in].
    if value.shape != expected[ours].shape:
      shape = expected[ours].shape
      shape = shape[::-1] if ours != "embedding" else shape
      problems.append(f"shape: {theirs} is {tensors[theirs].shape}, expected {shape}")
    params[ours] = value
  if problems:
    raise InputError("the checkpoint does not fit its config.json:\n  " + "\n  ".join(problems))
  return params
