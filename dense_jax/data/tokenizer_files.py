"""The files that keep a tokenizer: their names, and how they are written and read.

`tokenizer_config.json` describes the tokenizer. It is the file in which Hugging Face's tools keep
the same facts, under the same keys; the key `dense_jax_tokenizer` is ours and says which kind of
tokenizer it is:

| kind | beside the description | what that is |
|---|---|---|
| `bytes` | nothing | |
| `ids` | nothing | its key `names` has the names of a synthetic task's ids |
| `sentencepiece` | `tokenizer.model` | the SentencePiece model, unchanged |
| `huggingface` | `tokenizer.json` | the file of Hugging Face's tokenizers library, unchanged |

A run's folder, a converted folder and a folder of Hugging Face's tools (which lacks our key) are
therefore read alike.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from dense_jax.files import read_object, write_atomically

DESCRIPTION = "tokenizer_config.json"
KIND = "dense_jax_tokenizer"
# The key, in a converted folder, of the `config.data.template` of a model trained on responses.
TEMPLATE = "dense_jax_template"
HUGGING_FACE_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
# Older folders of Hugging Face's tools name their special tokens here.
_SPECIAL_TOKENS = "special_tokens_map.json"


def description(kind: str, **values: Any) -> dict[str, bytes]:
  """Returns the description file of a tokenizer of this kind, name -> content."""
  return {DESCRIPTION: (json.dumps({**values, KIND: kind}, indent=2) + "\n").encode()}


def write_files(directory: epath.Path, files: Mapping[str, bytes]) -> None:
  """Writes files into a directory, each atomically, the description last."""
  directory.mkdir(parents=True, exist_ok=True)
  for name in sorted(files, key=lambda name: name == DESCRIPTION):
    write_atomically(directory / name, files[name])


def read_description(folder: epath.Path) -> dict[str, Any]:
  """Returns the values that describe a folder's tokenizer; {} if no file describes it.

  Raises:
    InputError: a file is not a JSON object.
  """
  values: dict[str, Any] = {}
  for name in (_SPECIAL_TOKENS, DESCRIPTION):
    file = folder / name
    if not file.is_file():
      continue
    read = read_object(file, "a JSON object")
    if name == _SPECIAL_TOKENS:
      read = {key: read[key] for key in ("bos_token", "eos_token") if key in read}
    values |= read
  return values
