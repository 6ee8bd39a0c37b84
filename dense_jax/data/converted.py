"""A tokenizer as the files of a Hugging Face style folder."""

import json
from typing import Any

import sentencepiece

from dense_jax.data.byte_tokenizer import ByteTokenizer
from dense_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from dense_jax.data.sentencepiece_tokenizer import SPACE_MARK, SentencePieceTokenizer
from dense_jax.data.templates import parse_template
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.data.tokenizer_files import DESCRIPTION, TEMPLATE


def converted_files(tokenizer: Tokenizer, template: str = "") -> dict[str, bytes]:
  """Returns the tokenizer files that go beside a converted checkpoint, name -> content.

  These are the files of `Tokenizer.save`, whose `tokenizer_config.json` says more, for other
  programs:

      dense_jax_tokenizer   "bytes", "sentencepiece" or "huggingface"; ours
      add_bos_token         whether a prompt is bos and the text's ids, as it is in a run
      add_eos_token         false
      bos_token, eos_token  the tokens' names, except for "bytes"
      unk_token             that piece of a SentencePiece model
      add_prefix_space      whether the SentencePiece model puts a space before a text
      tokenizer_class       for a tokenizer.json that names none, transformers' class that reads it
      description           for "bytes", a tokenizer that no other library provides
      dense_jax_template    the template, if there is one; read by `load_saved_template`
      chat_template         the same for transformers, if the tokenizer has names for bos and eos

  What was beside a tokenizer.json when the run began, such as a chat template, stays there. Other
  tokenizers have no `tokenizer.json`: that is the format of Hugging Face's tokenizers library,
  which supports neither.

  Args:
    tokenizer: the run's tokenizer.
    template: the run's `config.data.template`, if it was trained on responses; else "".
  """
  files = tokenizer.files()
  values = {**json.loads(files[DESCRIPTION]), "add_eos_token": False} | _for_others(tokenizer)
  if template:
    values[TEMPLATE] = template
    if "eos_token" in values:
      values["chat_template"] = parse_template(template).jinja()
  return {**files, DESCRIPTION: (json.dumps(values, indent=2) + "\n").encode()}


def _for_others(tokenizer: Tokenizer) -> dict[str, Any]:
  if isinstance(tokenizer, ByteTokenizer):
    what = "the bytes of a text in UTF-8 are its ids; then bos and eos, as config.json has them"
    return {"description": what}
  if isinstance(tokenizer, HuggingFaceTokenizer):
    return {"tokenizer_class": tokenizer.settings.get("tokenizer_class", "PreTrainedTokenizerFast")}
  if isinstance(tokenizer, SentencePieceTokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    return {
        "bos_token": processor.id_to_piece(tokenizer.bos_id),
        "eos_token": processor.id_to_piece(tokenizer.eos_id),
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "add_prefix_space": processor.encode("a", out_type=str)[0].startswith(SPACE_MARK),
    }
  return {}
