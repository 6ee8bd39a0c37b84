"""Tokenizers: text to ids and back, and how they are loaded.

There are four kinds, each in a module of its own: bytes (`byte_tokenizer`), SentencePiece models
(`sentencepiece_tokenizer`), which `tokenizer_training` trains, files of Hugging Face's tokenizers
library (`hugging_face_tokenizer`), and the ids of synthetic tasks (`id_tokenizer`).
`tokenizer_files` says how they are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from etils import epath

from dense_jax.config import DataConfig, invalid
from dense_jax.data.byte_tokenizer import ByteTokenizer
from dense_jax.data.cache import cache_folder, digest, named_errors, partial_folder
from dense_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from dense_jax.data.id_tokenizer import IdTokenizer
from dense_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from dense_jax.data.sources import TextSource
from dense_jax.data.tokenizer_files import (
  DESCRIPTION,
  HUGGING_FACE_FILE,
  KIND,
  SENTENCEPIECE_FILE,
  read_description,
)
from dense_jax.data.tokenizer_training import train_sentencepiece, training_settings
from dense_jax.errors import InputError
from dense_jax.files import make_path

_FIELD = "config.data.tokenizer"
_NAMES = '"train", "bytes"'
_FILES = (
    "the path of a SentencePiece .model file or of a tokenizer.json, or a folder that holds one"
)
# The folder of a run in which its tokenizer lies.
_OF_RUN = "tokenizer"


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
    """Returns the ids of a text, without bos and eos, unless the text itself spells them.

    Only `HuggingFaceTokenizer` finds special tokens in a text.
    """
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

  def files(self) -> dict[str, bytes]:
    """Returns the files that `load_saved_tokenizer` reads, name -> content."""
    ...

  def save(self, directory: epath.Path) -> None:
    """Writes `files` into a directory, each atomically."""
    ...


def load_tokenizer(config: DataConfig, train_source: TextSource) -> Tokenizer:
  """Loads the tokenizer that `config.tokenizer` names, for training: `add_bos` is true.

  It names "bytes"; "train"; a SentencePiece model; a tokenizer.json, which is described by the
  tokenizer_config.json beside it, if it is called so; or a folder that `load_saved_tokenizer`
  reads, or a run's folder. "train" trains on `train_source`, unless `config.cache_dir` already
  holds the result.

  Raises:
    InputError: the path holds no tokenizer, a package is missing that reads it, or training fails
      (see `train_sentencepiece`).
  """
  if config.tokenizer != "train":
    return load_named_tokenizer(config.tokenizer)
  key = digest(train_source.fingerprint, training_settings(config.vocab_size))
  path = cache_folder(config.cache_dir, "tokenizers") / f"{key}.model"
  if not path.exists():
    with partial_folder(config.cache_dir, "tokenizers", path.name) as partial:
      with named_errors(config.cache_dir):
        texts = (document.text for document in train_source)
        train_sentencepiece(texts, config.vocab_size, partial / "model")
      train_source.check_unchanged()
      with named_errors(config.cache_dir):
        (partial / "model").rename(path)
  return _load_file(
      epath.Path(path), SentencePieceTokenizer, "config.data.cache_dir",
      "no other files than this program's", add_bos=True,
  )


def load_named_tokenizer(name: str, field: str = _FIELD, names: str = _NAMES) -> Tokenizer:
  """Loads a tokenizer by a name as in `config.data.tokenizer`, which is not "train".

  Args:
    name: the name.
    field: the field or option that it was given for, for error messages.
    names: what is valid for it besides files.

  Raises:
    InputError: see `load_tokenizer`.
  """
  if name == "bytes":
    return ByteTokenizer()
  path = make_path(name, field)
  if path.is_dir():
    inner = path / _OF_RUN
    try:
      return _load_folder(inner if inner.is_dir() else path, add_bos=True)
    except InputError as error:
      raise InputError(f"{field} = {str(path)!r} is not valid: {error}") from error
  valid = f"{names}, {_FILES}"
  if path.suffix != ".json":
    return _load_file(path, SentencePieceTokenizer, field, valid, add_bos=True)
  settings = read_description(path.parent) if path.name == HUGGING_FACE_FILE else {}
  return _load_file(path, HuggingFaceTokenizer, field, valid, settings=settings, add_bos=True)


def _load_file(
    path: epath.Path, kind: Callable[..., Tokenizer], field: str, valid: str, **options: Any
) -> Tokenizer:
  try:
    return kind(path.read_bytes(), **options)
  except InputError:
    raise
  except (OSError, ValueError) as error:
    raise invalid(field, str(path), f"{valid} ({error})") from error


def load_saved_tokenizer(directory: epath.PathLike) -> Tokenizer:
  """Loads a tokenizer from a folder.

  The folder is one that `Tokenizer.save` or the command `convert` wrote, or one of Hugging Face's
  tools. Of the latter, `tokenizer.json` is read if there is one, else `tokenizer.model`; what
  `tokenizer_config.json` says of bos and eos is obeyed.

  Raises:
    InputError: the folder holds no tokenizer, or a damaged one, or a package is missing that reads
      it.
  """
  return _load_folder(epath.Path(directory), add_bos=None)


def _load_folder(folder: epath.Path, add_bos: bool | None) -> Tokenizer:
  """Loads a folder's tokenizer; `add_bos` None leaves that to the folder."""
  settings = read_description(folder)
  kind = settings.get(KIND)
  if KIND not in settings:
    names = {HUGGING_FACE_FILE: "huggingface", SENTENCEPIECE_FILE: "sentencepiece"}
    kind = next((kind for name, kind in names.items() if (folder / name).is_file()), None)
    if kind is None:
      raise InputError(
          f"no tokenizer in {folder}: expected {' or '.join(names)}, or a {DESCRIPTION} that this "
          "program wrote"
      )
  if kind == "bytes":
    return ByteTokenizer()
  if kind == "ids":
    return _id_tokenizer(folder, settings.get("names"))
  if kind == "sentencepiece":
    adds = settings.get("add_bos_token")
    chosen = adds if add_bos is None and isinstance(adds, bool) else True
    return _load_file(
        folder / SENTENCEPIECE_FILE, SentencePieceTokenizer, "saved tokenizer",
        "a SentencePiece model", add_bos=chosen,
    )
  if kind == "huggingface":
    return _load_file(
        folder / HUGGING_FACE_FILE, HuggingFaceTokenizer, "saved tokenizer",
        "a file of the tokenizers library", settings=settings, add_bos=add_bos,
    )
  raise InputError(
      f'{folder / DESCRIPTION} is not valid: expected "{KIND}": "bytes", "ids", "sentencepiece" or '
      '"huggingface"'
  )


def _id_tokenizer(folder: epath.Path, names: Any) -> IdTokenizer:
  try:
    return IdTokenizer(names)
  except (AttributeError, TypeError, ValueError) as error:
    raise InputError(
        f'{folder / DESCRIPTION} is not valid: expected "names": a list of words that differ'
    ) from error
