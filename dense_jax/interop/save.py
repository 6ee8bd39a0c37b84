"""Writing Hugging Face style checkpoints: `config.json` beside the tensors."""

import json
import os
import pathlib
import shutil

from dense_jax.config import invalid
from dense_jax.files import temporary_beside, write_atomically
from dense_jax.interop.kinds import choose
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import get_params, unrolled


def check_destination(path: str, name: str = "path") -> None:
  """Raises InputError, calling the path `name`, where `save_hf` would not write."""
  folder = pathlib.Path(path)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise invalid(name, path, "a folder that is empty or does not exist yet")


def save_hf(
    model: LanguageModel, path: str, *, bos_token_id: int | None = None,
    eos_token_id: int | None = None,
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
      orientation) to. It appears whole or not at all; its parents are made.
    bos_token_id: the token that begins a text, for `config.json`; None says none.
    eos_token_id: the token that ends one.

  Returns:
    The layout's name.

  Raises:
    InputError: the destination exists and is not an empty folder.
  """
  from safetensors.numpy import save_file

  check_destination(path)
  name, config, layout = choose(model.config)
  tensors = layout.to_theirs(get_params(unrolled(model)))
  tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": None}
  text = json.dumps(config | tokens | {"torch_dtype": "float32"}, indent=2) + "\n"

  folder = pathlib.Path(path).absolute()
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = temporary_beside(folder)
  partial.mkdir()
  try:
    write_atomically(partial / "config.json", text.encode())
    file = partial / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    with file.open("rb") as written:
      os.fsync(written.fileno())
    os.replace(partial, folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return name
