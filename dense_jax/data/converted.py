"""Writes a run's tokenizer as the files of a Hugging Face style folder."""

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
  """Returns the tokenizer files that go beside a converted checkpoint, name -> content.

  These are `tokenizer.model`, the SentencePiece model unchanged (if the tokenizer has one), and
  `tokenizer_config.json`, which describes how text becomes the model's input:

      dense_jax_tokenizer   "sentencepiece" or "bytes"; read by `load_saved_tokenizer`
      add_bos_token         true, and add_eos_token false: a prompt is bos and the text's ids
      bos_token, eos_token, unk_token   those pieces of a SentencePiece model
      add_prefix_space      whether the SentencePiece model puts a space before a text
      description           for "bytes", a tokenizer that no other library provides

  The files name no tokenizer class of another library, and there is no `tokenizer.json`: that
  is the format of Hugging Face's tokenizers library, which supports neither tokenizer.
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
