"""Tokenizers: text to ids and back.

A tokenizer trained here is byte-pair encoding with byte fallback and without any
normalisation: whatever the text, decode(encode(text)) == text. Pieces may span spaces,
line ends and kinds of characters, so that an indentation or a common phrase is one token.
"""

import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from etils import epath

from dense_jax.config import DataConfig, invalid
from dense_jax.data import sentencepiece_training
from dense_jax.data.cache import cache_folder, digest, named_errors, partial_folder
from dense_jax.data.sources import TextSource
from dense_jax.errors import InputError
from dense_jax.files import make_path, parse_json, write_atomically

_SAMPLE_BYTES = 4 << 20
_CHUNK = 2000
_BYTES_AT_A_TIME = 1 << 20
# SentencePiece writes a space inside a piece as this character.
SPACE_MARK = "\u2581"
_TRAINER_OPTIONS: dict[str, Any] = {
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


# The file, and its key, that says which kind of tokenizer is in a folder: in a run's, and in one
# that `convert` wrote, where tokenizer.json would be a file of Hugging Face's own format.
_RUN = ("tokenizer.json", "kind")
CONVERTED = ("tokenizer_config.json", "dense_jax_tokenizer")


class Tokenizer(Protocol):
  """Text to ids and back."""

  @property
  def vocab_size(self) -> int:
    """Ids are in [0, vocab_size)."""
    ...

  @property
  def bos_id(self) -> int:
    """A document's first token."""
    ...

  @property
  def eos_id(self) -> int:
    """A document's last token."""
    ...

  @property
  def fingerprint(self) -> str:
    """Hex; two tokenizers with the same one give the same ids."""
    ...

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without bos and eos."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, on all cores where the tokenizer can."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids. Control ids, and ids beyond the vocabulary, give no text.

    The text of a part is not always a part of the text: of ids that go on with others, use
    `spell`.
    """
    ...

  def save(self, directory: epath.Path) -> None:
    """Writes what `load_saved_tokenizer` needs, each file atomically."""
    ...


class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255, then bos and eos."""

  vocab_size = 258
  bos_id = 256
  eos_id = 257
  fingerprint = digest("bytes")

  def encode(self, text: str) -> list[int]:
    """The text's UTF-8 bytes."""
    content = text.encode()
    ids: list[int] = []
    for start in range(0, len(content), _BYTES_AT_A_TIME):  # Signals are heard in between.
      ids += content[start : start + _BYTES_AT_A_TIME]
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """The UTF-8 bytes of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of the bytes; what is not valid UTF-8 becomes U+FFFD."""
    return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

  def save(self, directory: epath.Path) -> None:
    """Writes tokenizer.json."""
    _save_kind(directory, "bytes")


class SentencePieceTokenizer:
  """Any SentencePiece model that has an eos piece; `model` holds its serialised form.

  A model without bos takes eos as a document's first token. Whether decoding gives back
  the text exactly is the model's affair; it does for those of `train_sentencepiece`.
  """

  def __init__(self, model: bytes) -> None:
    """Loads a serialised model.

    Raises:
      ValueError: it is no SentencePiece model, or has no eos piece.
    """
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise ValueError("not a SentencePiece model") from error
    self.model = model
    self.vocab_size: int = self._processor.get_piece_size()
    self.eos_id: int = self._processor.eos_id()
    if self.eos_id < 0:
      raise ValueError("a SentencePiece model without an eos piece")
    bos_id: int = self._processor.bos_id()
    self.bos_id = self.eos_id if bos_id < 0 else bos_id
    self.fingerprint = digest(hashlib.sha256(model).digest())
    self._mark_ids = self._find_mark_ids()

  def _find_mark_ids(self) -> list[int]:
    """The bytes of the space mark, where only it keeps the model from being lossless.

    SentencePiece decodes the mark as a space even where the text had the mark itself;
    spelt as bytes it comes back. Empty for a model that changes spaces anyway, as one does
    that puts a space before the text.
    """
    probe = "  a b \n "
    pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
    ids = [self._processor.piece_to_id(piece) for piece in pieces]
    spelt = all(self._processor.is_byte(i) for i in ids)
    lossless = self.decode(self._processor.encode(probe) * 2) == probe * 2
    return ids if spelt and lossless else []

  def encode(self, text: str) -> list[int]:
    """The text's pieces."""
    parts = text.split(SPACE_MARK) if self._mark_ids else [text]
    first, *rest = self._encode(parts)
    for ids in rest:
      first += self._mark_ids + ids
    return first

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """The pieces of each text, on all cores."""
    batch = self._encode(texts)
    for index, text in enumerate(texts):
      if self._mark_ids and SPACE_MARK in text:
        batch[index] = self.encode(text)
    return batch

  def _encode(self, texts: Sequence[str]) -> list[list[int]]:
    """The pieces of each text, on all cores.

    Signals are heard meanwhile: Python handles them between two steps of the main thread, which
    waits here in one that can be broken off. SentencePiece, in another thread, can not; it has let
    go of the interpreter, and if its result is not waited for, nobody waits for it.
    """
    result: concurrent.futures.Future[list[list[int]]] = concurrent.futures.Future()

    def encode() -> None:
      try:
        result.set_result(self._processor.encode(list(texts), num_threads=-1))
      except BaseException as error:
        result.set_exception(error)

    threading.Thread(target=encode, daemon=True).start()
    return result.result()

  def decode(self, ids: Sequence[int]) -> str:
    """The text of the pieces; bytes that are not valid UTF-8 become U+FFFD."""
    known = (int(i) for i in ids if 0 <= i < self.vocab_size)
    return self._processor.decode([i for i in known if not self._processor.is_control(i)])

  def save(self, directory: epath.Path) -> None:
    """Writes tokenizer.model, then tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "tokenizer.model", self.model)
    _save_kind(directory, "sentencepiece")


def spell(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> tuple[str, str]:
  """What a tokenizer spells for a prompt and its continuation together, cut where the new begins.

  Decoded apart, a continuation can lose the space before its first word, which many models drop
  at the beginning of a text, and a character whose bytes are split between the two is lost on
  either side.

  Args:
    tokenizer: whose ids they are.
    prompt_ids: the prompt's, without bos.
    new_ids: those that follow.

  Returns:
    The prompt's text and the continuation's. Joined they are the text of all ids. A character
    that the continuation completes is the continuation's.
  """
  text, alone = tokenizer.decode([*prompt_ids, *new_ids]), tokenizer.decode(prompt_ids)
  pairs = enumerate(zip(alone, text, strict=False))
  border = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(alone), len(text)))
  return text[:border], text[border:]


def _save_kind(directory: epath.Path, kind: str) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  file, key = _RUN
  write_atomically(directory / file, json.dumps({key: kind}).encode())


def _chunks(text: str) -> Iterator[str]:
  """Cuts a text after the first line end beyond 2000 characters, or at 4000."""
  start = 0
  while start < len(text):
    line_end = text.find("\n", start + _CHUNK - 1, start + 2 * _CHUNK)
    end = start + 2 * _CHUNK if line_end < 0 else line_end + 1
    yield text[start:end]
    start = end


def _sample(texts: Iterable[str]) -> list[str]:
  """Chunks taken evenly over all texts, at most `_SAMPLE_BYTES` of UTF-8.

  Every stride-th chunk is kept, and each time they grow too many, every other one of
  them is dropped and the stride doubled: one pass, and little memory.
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


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_path: Path) -> None:
  """Trains a lossless tokenizer on a sample of the texts and writes it atomically.

  The same texts give the same model. unk, bos and eos are 0, 1 and 2, the 256 bytes 3 to
  258. Training is a process of its own (`sentencepiece_training`), so that an exception that a
  signal raises here ends it at once.

  Args:
    texts: read once, to the end.
    vocab_size: pieces, with those 259.
    model_path: the .model file to write; its folder exists.

  Raises:
    InputError: the texts have too few different pieces, or too many characters, for
      `vocab_size`.
  """
  request = json.dumps([_sample(texts), {**_TRAINER_OPTIONS, "vocab_size": vocab_size}])
  with subprocess.Popen(
      # -P: modules beside the script are not taken for libraries of the same name.
      [sys.executable, "-P", sentencepiece_training.__file__, str(os.getpid())],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  ) as trainer:
    try:
      answer, _ = trainer.communicate(request.encode())
    except BaseException:
      trainer.kill()
      raise
  if trainer.returncode == sentencepiece_training.REFUSED:
    raise _training_error(vocab_size, answer.decode())
  if trainer.returncode:
    raise RuntimeError(
        f"the process that trains the tokenizer ended with status {trainer.returncode}"
    )
  write_atomically(model_path, answer)


def _training_error(vocab_size: int, message: str) -> InputError:
  most = re.search(r"value <= (\d+)", message)
  least = re.search(r"\d+ vs (\d+)", message)
  if most:
    valid = f"an integer <= {most[1]}, all the pieces that this text has"
  elif least:
    valid = f"an integer >= {least[1]}, which holds this text's characters"
  else:
    valid = f"a size that SentencePiece can train on this text ({message})"
  return invalid("config.data.vocab_size", vocab_size, valid)


def load_tokenizer(config: DataConfig, train_source: TextSource) -> Tokenizer:
  """The tokenizer that `config.tokenizer` names.

  "train" trains on `train_source`, unless `config.cache_dir` has the result already.

  Raises:
    InputError: a path that holds no SentencePiece model; see `train_sentencepiece`.
  """
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  if config.tokenizer != "train":
    return _load_model(
        make_path(config.tokenizer, "config.data.tokenizer"),
        "config.data.tokenizer",
        '"train", "bytes" or the path of a SentencePiece .model file',
    )
  settings = json.dumps([config.vocab_size, _SAMPLE_BYTES, _CHUNK, _TRAINER_OPTIONS])
  key = digest(train_source.fingerprint, settings)
  path = cache_folder(config.cache_dir, "tokenizers") / f"{key}.model"
  if not path.exists():
    with partial_folder(config.cache_dir, "tokenizers", path.name) as partial:
      with named_errors(config.cache_dir):
        texts = (document.text for document in train_source)
        train_sentencepiece(texts, config.vocab_size, partial / "model")
      train_source.check_unchanged()
      with named_errors(config.cache_dir):
        (partial / "model").rename(path)
  return _load_model(path, "config.data.cache_dir", "no other files than this program's")


def _load_model(path: epath.PathLike, field: str, valid: str) -> SentencePieceTokenizer:
  try:
    return SentencePieceTokenizer(epath.Path(path).read_bytes())
  except (OSError, ValueError) as error:
    raise invalid(field, str(path), f"{valid} ({error})") from error


def load_saved_tokenizer(directory: epath.PathLike) -> Tokenizer:
  """What a tokenizer's `save`, or the command line `convert`, wrote into a directory.

  Raises:
    InputError: there is no such tokenizer, or it is damaged.
  """
  folder = epath.Path(directory)
  for name, key in (_RUN, CONVERTED):
    if (folder / name).is_file():
      return _load_described(folder, folder / name, key)
  raise InputError(
      f"no tokenizer in {folder}: expected a tokenizer.json that a training run wrote, or a "
      "tokenizer_config.json that convert wrote"
  )


def _load_described(folder: epath.Path, description: epath.Path, key: str) -> Tokenizer:
  try:
    values = parse_json(description.read_bytes())
  except (OSError, ValueError) as error:
    raise InputError(f"{description} is not JSON: {error}") from error
  kind = values.get(key) if isinstance(values, dict) else None
  if kind == "bytes":
    return ByteTokenizer()
  if kind != "sentencepiece":
    raise InputError(f'{description} is not valid: expected "{key}": "bytes" or "sentencepiece"')
  return _load_model(
      folder / "tokenizer.model", "saved tokenizer", "the SentencePiece model of the run"
  )
