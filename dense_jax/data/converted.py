"""A run's tokenizer as files of a folder in Hugging Face's form."""

import json
from typing import Any

import sentencepiece

from dense_jax.data.tokenizer import (
    CONVERTED,
    SPACE_MARK,
    SentencePieceTokenizer,
    Tokenizer,
)


def converted_files(tokenizer: Tokenizer) -> dict[str, bytes]:
  """The files of a tokenizer beside a converted checkpoint, name -> content.

  They are `tokenizer.model`, the SentencePiece model as it is, if there is one, and
  `tokenizer_config.json`, which says how text becomes the model's input:

      dense_jax_tokenizer   "sentencepiece" or "bytes"; `load_saved_tokenizer` reads it
      add_bos_token         true, and add_eos_token false: a prompt is bos and the text's ids
      bos_token, eos_token, unk_token   those pieces of a SentencePiece model
      add_prefix_space      whether that model puts a space before a text
      description           of a tokenizer that no other library has

  No tokenizer class of another library is named, and no `tokenizer.json` written: that is a
  format of Hugging Face's tokenizers, which these are not in.
  """
  file, key = CONVERTED
  values: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False}
  if not isinstance(tokenizer, SentencePieceTokenizer):
    what = "the bytes of a text in UTF-8 are its ids; then bos and eos, as config.json has them"
    values |= {key: "bytes", "description": what}
    return {file: _json(values)}
  processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  values |= {
      key: "sentencepiece",
      "bos_token": processor.id_to_piece(tokenizer.bos_id),
      "eos_token": processor.id_to_piece(tokenizer.eos_id),
      "unk_token": processor.id_to_piece(processor.unk_id()),
      "add_prefix_space": processor.encode("a", out_type=str)[0].startswith(SPACE_MARK),
  }
  return {"tokenizer.model": tokenizer.model, file: _json(values)}


def _json(values: dict[str, Any]) -> bytes:
  return (json.dumps(values, indent=2) + "\n").encode()
