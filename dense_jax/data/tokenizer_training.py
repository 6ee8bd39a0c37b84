"""Trains a SentencePiece tokenizer on a sample of texts.

It uses byte-pair encoding with byte fallback and no normalisation, so that
decode(encode(text)) == text for every text. Pieces may span spaces, line ends and kinds of
characters, so that an indentation or a common phrase can be one token.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dense_jax.config import invalid
from dense_jax.data import sentencepiece_training
from dense_jax.errors import InputError
from dense_jax.files import write_atomically

_SAMPLE_BYTES = 4 << 20
_CHUNK = 2000
TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.9999,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_by_whitespace": False,
    "split_by_unicode_script": False,
    "split_by_number": False,
    "max_sentencepiece_length": 32,
    "max_sentence_length": 1 << 20,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "minloglevel": 2,
}


def training_settings(vocab_size: int) -> str:
  """Returns all that a trained tokenizer depends on besides the texts, as JSON."""
  return json.dumps([vocab_size, _SAMPLE_BYTES, _CHUNK, TRAINER_OPTIONS])


def _chunks(text: str) -> Iterator[str]:
  """Yields chunks of a text, cut after the first line end beyond 2000 characters, or at 4000."""
  start = 0
  while start < len(text):
    line_end = text.find("\n", start + _CHUNK - 1, start + 2 * _CHUNK)
    end = start + 2 * _CHUNK if line_end < 0 else line_end + 1
    yield text[start:end]
    start = end


def _sample(texts: Iterable[str]) -> list[str]:
  """Returns chunks spread evenly over all texts, at most `_SAMPLE_BYTES` of UTF-8.

  Needs one pass and little memory: every stride-th chunk is kept, and whenever the kept chunks
  exceed the limit, every other one is dropped and the stride doubled.
  """
  kept: list[tuple[str, int]] = []
  size, stride, number = 0, 1, 0
  for text in texts:
    for chunk in _chunks(text):
      if number % stride == 0:
        kept.append((chunk, len(chunk.encode())))
        size += kept[-1][1]
      number += 1
      while size > _SAMPLE_BYTES:
        kept = kept[::2]
        stride *= 2
        size = sum(length for _, length in kept)
  return [chunk for chunk, _ in kept]


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_path: Path, field: str = "config.data.vocab_size"
) -> None:
  """Trains a lossless tokenizer on a sample of the texts and writes it atomically.

  The same texts give the same model. The ids of unk, bos and eos are 0, 1 and 2, those of the
  256 bytes are 3 to 258. Training runs in a separate process (`sentencepiece_training`), which
  is killed at once if a signal handler raises an exception here.

  Args:
    texts: the texts, read once to the end.
    vocab_size: the number of pieces, including the 259 above.
    model_path: the .model file to write; its folder must exist.
    field: what `vocab_size` was given by, for error messages.

  Raises:
    InputError: the texts have too few different pieces, or too many characters, for
      `vocab_size`.
    RuntimeError: the training process failed for another reason.
  """
  request = json.dumps([_sample(texts), {**TRAINER_OPTIONS, "vocab_size": vocab_size}])
  with subprocess.Popen(
      # -P keeps modules beside the script from shadowing libraries of the same name.
      [sys.executable, "-P", sentencepiece_training.__file__, str(os.getpid())],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  ) as trainer:
    try:
      answer, _ = trainer.communicate(request.encode())
    except BaseException:
      trainer.kill()
      raise
  if trainer.returncode == sentencepiece_training.REFUSED:
    raise _training_error(field, vocab_size, answer.decode())
  if trainer.returncode:
    raise RuntimeError(
        f"the process that trains the tokenizer ended with status {trainer.returncode}"
    )
  write_atomically(model_path, answer)


def _training_error(field: str, vocab_size: int, message: str) -> InputError:
  most = re.search(r"value <= (\d+)", message)
  least = re.search(r"\d+ vs (\d+)", message)
  if most:
    valid = f"an integer <= {most[1]}, all the pieces that this text has"
  elif least:
    valid = f"an integer >= {least[1]}, which holds this text's characters"
  else:
    valid = f"a size that SentencePiece can train on this text ({message})"
  return invalid(field, vocab_size, valid)
