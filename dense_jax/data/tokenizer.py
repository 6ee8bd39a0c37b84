"""Tokenizers: text to ids and back.

Tokenizers trained here use byte-pair encoding with byte fallback and no normalisation, so that
decode(encode(text)) == text for every text. Pieces may span spaces, line ends and kinds of
characters, so that an indentation or a common phrase can be one token.
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


# The file and the key in it that say which kind of tokenizer a folder holds: in a run's folder,
# and in a folder that `convert` wrote. The latter cannot use tokenizer.json, because Hugging Face
# tools would read a file of that name as their own format.
_RUN = ("tokenizer.json", "kind")
CONVERTED = ("tokenizer_config.json", "dense_jax_tokenizer")


class Tokenizer(Protocol):
  """Text to ids and back."""

  @property
  def vocab_size(self) -> int:
    """Number of ids, which are 0 to vocab_size - 1."""
    ...

  @property
  def bos_id(self) -> int:
    """Id of a document's first token."""
    ...

  @property
  def eos_id(self) -> int:
    """Id of a document's last token."""
    ...

  @property
  def add_bos(self) -> bool:
    """True if bos goes before a text that a model reads, as before the documents of training."""
    ...

  @property
  def fingerprint(self) -> str:
    """Hex digest; two tokenizers with the same fingerprint give the same ids."""
    ...

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without bos and eos."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes each text, on all cores if the tokenizer supports that."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids. Control ids, and ids outside the vocabulary, give no text.

    The texts of two halves of a sequence do not always join to the text of the whole; use
    `dense_jax.data.spelling.spell` for a continuation.
    """
    ...

  def save(self, directory: epath.Path) -> None:
    """Writes the files that `load_saved_tokenizer` reads, each atomically."""
    ...


class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255, then bos and eos."""

  vocab_size = 258
  bos_id = 256
  eos_id = 257
  add_bos = True
  fingerprint = digest("bytes")

  def encode(self, text: str) -> list[int]:
    """Returns the text's UTF-8 bytes."""
    content = text.encode()
    ids: list[int] = []
    for start in range(0, len(content), _BYTES_AT_A_TIME):  # Lets Python handle signals.
      ids += content[start : start + _BYTES_AT_A_TIME]
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the UTF-8 bytes of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the bytes; invalid UTF-8 becomes U+FFFD."""
    return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

  def save(self, directory: epath.Path) -> None:
    """Writes tokenizer.json."""
    _save_kind(directory, "bytes")


class SentencePieceTokenizer:
  """A SentencePiece model that has an eos piece; `model` holds its serialised form.

  If the model has no bos piece, eos is a document's first token too. Decoding restores the text
  exactly for models of `train_sentencepiece`; other models may normalise the text.
  """

  add_bos = True

  def __init__(self, model: bytes) -> None:
    """Loads a serialised model.

    Raises:
      ValueError: `model` is not a SentencePiece model, or has no eos piece.
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
    """Returns the byte ids that spell the space mark, if that makes the model lossless; else [].

    SentencePiece decodes the mark as a space even if the text had the mark itself; spelt as
    bytes, the mark is restored. A model that changes spaces in any case, such as one that puts a
    space before the text, cannot be made lossless that way.
    """
    probe = "  a b \n "
    pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
    ids = [self._processor.piece_to_id(piece) for piece in pieces]
    spelt = all(self._processor.is_byte(i) for i in ids)
    lossless = self.decode(self._processor.encode(probe) * 2) == probe * 2
    return ids if spelt and lossless else []

  def encode(self, text: str) -> list[int]:
    """Returns the ids of the text's pieces."""
    parts = text.split(SPACE_MARK) if self._mark_ids else [text]
    first, *rest = self._encode(parts)
    for ids in rest:
      first += self._mark_ids + ids
    return first

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text's pieces, computed on all cores."""
    batch = self._encode(texts)
    for index, text in enumerate(texts):
      if self._mark_ids and SPACE_MARK in text:
        batch[index] = self.encode(text)
    return batch

  def _encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Runs SentencePiece on all cores, in a way that signals can interrupt.

    Python runs signal handlers in the main thread, between bytecodes. A call into SentencePiece
    would delay them until it returns; waiting for a future does not. SentencePiece therefore
    runs in another thread, with the global interpreter lock released. The thread is a daemon, so
    that nobody waits for it if a handler raises here.
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
    """Returns the text of the pieces; bytes that are not valid UTF-8 become U+FFFD."""
    known = (int(i) for i in ids if 0 <= i < self.vocab_size)
    return self._processor.decode([i for i in known if not self._processor.is_control(i)])

  def save(self, directory: epath.Path) -> None:
    """Writes tokenizer.model, then tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "tokenizer.model", self.model)
    _save_kind(directory, "sentencepiece")


def _save_kind(directory: epath.Path, kind: str) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  file, key = _RUN
  write_atomically(directory / file, json.dumps({key: kind}).encode())


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


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_path: Path) -> None:
  """Trains a lossless tokenizer on a sample of the texts and writes it atomically.

  The same texts give the same model. The ids of unk, bos and eos are 0, 1 and 2, those of the
  256 bytes are 3 to 258. Training runs in a separate process (`sentencepiece_training`), which
  is killed at once if a signal handler raises an exception here.

  Args:
    texts: the texts, read once to the end.
    vocab_size: the number of pieces, including the 259 above.
    model_path: the .model file to write; its folder must exist.

  Raises:
    InputError: the texts have too few different pieces, or too many characters, for
      `vocab_size`.
    RuntimeError: the training process failed for another reason.
  """
  request = json.dumps([_sample(texts), {**_TRAINER_OPTIONS, "vocab_size": vocab_size}])
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
  """Loads the tokenizer that `config.tokenizer` names: "bytes", "train" or a .model file's path.

  "train" trains on `train_source`, unless `config.cache_dir` already holds the result.

  Raises:
    InputError: the path holds no SentencePiece model, or training fails (see
      `train_sentencepiece`).
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
  """Loads a tokenizer from a directory that `Tokenizer.save` or the command `convert` wrote.

  Raises:
    InputError: the directory holds no tokenizer, or a damaged one.
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
