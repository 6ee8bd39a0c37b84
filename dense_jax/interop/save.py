"""Writing Hugging Face style checkpoints: `config.json` beside the tensors."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping

from dense_jax.files import temporary_beside, write_atomically
from dense_jax.interop.kinds import choose
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import by_layer, get_params
from dense_jax.outputs import check_destination


def save_hf(
    model: LanguageModel, path: str, *, bos_token_id: int | None = None,
    eos_token_id: int | None = None, files: Mapping[str, bytes] | None = None,
) -> str:
  """Saves a model so that `load_hf`, and where it can be transformers, loads it.

  The layout is the first that can say what the model computes:

      dense.depth = 0      family mamba, mamba2 or transformer: `MambaForCausalLM`,
                           `Mamba2ForCausalLM` or `LlamaForCausalLM` of transformers
      as released          family gau_retnet with dense.inject=inputs and the other options
                           of `dense` as they are by default: the authors' DenseRetNet
      everything else      this project's own (`dense_jax.interop.dense`); also where an
                           option has no counterpart, as a width that is no multiple of the
                           number of attention heads

  Args:
    model: any model; scanned layers are written apart.
    path: the folder to write `config.json` and `model.safetensors` (float32, PyTorch's
      orientation) to. It appears whole or not at all; its parents are made. A leading ~ is the
      home directory.
    bos_token_id: the token that begins a text, for `config.json`; None says none.
    eos_token_id: the token that ends one.
    files: more files of the folder, such as the tokenizer's: name -> content.

  Returns:
    The layout's name.

  Raises:
    InputError: the destination exists and is not an empty folder, or cannot be written to.
  """
  from safetensors.numpy import save_file

  folder = check_destination(path, "path")
  name, config, layout = choose(model.config)
  tensors = layout.to_theirs(by_layer(model.config, get_params(model)))
  tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": None}
  text = json.dumps(config | tokens | {"torch_dtype": "float32"}, indent=2) + "\n"

  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = temporary_beside(folder)
  partial.mkdir()
  try:
    for file_name, content in {**(files or {}), "config.json": text.encode()}.items():
      write_atomically(partial / file_name, content)
    weights = partial / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors makes a file that only its owner may read: here all have the user's usual mode.
    shutil.copymode(partial / "config.json", weights)
    if folder.exists():
      shutil.copymode(folder, partial)
    for written in (weights, partial):
      _sync(written)
    os.replace(partial, folder)
    _sync(folder.parent)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return name


def _sync(path: pathlib.Path) -> None:
  """Has the disk keep a file's content, or a folder's entries."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
