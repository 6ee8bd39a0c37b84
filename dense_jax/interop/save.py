"""Writes Hugging Face style checkpoints: a folder with `config.json` and the tensors."""

import json
import shutil
from collections.abc import Mapping

from dense_jax.files import sync, whole_folder, write_atomically
from dense_jax.interop.kinds import choose
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import by_layer, get_params
from dense_jax.outputs import check_destination


def save_hf(
    model: LanguageModel, path: str, *, bos_token_id: int | None = None,
    eos_token_id: int | None = None, files: Mapping[str, bytes] | None = None,
) -> str:
  """Saves a model in a form that `load_hf` and, if possible, transformers can load.

  The layout is the first of these that can represent the model:

      transformers         `MambaForCausalLM`, `Mamba2ForCausalLM` or `LlamaForCausalLM`: family
                           mamba, mamba2 or transformer with dense.depth = 0
      the authors'         DenseRetNet as released: family gau_retnet with dense.inject=inputs
                           and the defaults of the other options of `dense`
      this project's own   `dense_jax.interop.native`: everything else, such as a transformer
                           whose width is not a multiple of the number of heads

  Args:
    model: any model; the file has one entry for each layer, even if layers are scanned.
    path: the folder to write `config.json` and `model.safetensors` (float32, PyTorch's
      orientation) to. It is written atomically, and its parents are made. A leading ~ is the
      home directory.
    bos_token_id: the token that begins a text, for `config.json`; None means that there is none.
    eos_token_id: the token that ends a text; None means that there is none.
    files: more files to write, such as the tokenizer's: name -> content.

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

  with whole_folder(folder) as partial:
    for file_name, content in {**(files or {}), "config.json": text.encode()}.items():
      write_atomically(partial / file_name, content)
    weights = partial / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors makes a file that only its owner may read; give it the user's usual mode.
    shutil.copymode(partial / "config.json", weights)
    sync(weights)
  return name
