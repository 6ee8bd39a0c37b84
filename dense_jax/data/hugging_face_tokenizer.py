"""The tokenizer.json of Hugging Face's tokenizers library as a tokenizer.

Ids are those that the library gives with `add_special_tokens=False`, so that scores agree with
those of other programs. In particular, added tokens are found wherever the text spells them, the
special ones too: a text that holds "<|endoftext|>" has that token's id in it, as with transformers
and lm-eval. What the file says of truncation, padding and BPE dropout is not obeyed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from etils import epath

from dense_jax.data.background import in_thread
from dense_jax.data.cache import digest
from dense_jax.data.tokenizer_files import HUGGING_FACE_FILE, description, write_files
from dense_jax.errors import InputError

# Special tokens that serve as eos and bos in a file that nothing beside it describes.
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]",
              "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|im_end|>")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]",
              "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<|startoftext|>")
# The library needs about 180 bytes of memory for each byte of text. Long texts are cut into pieces
# of this many characters at least, and so many characters are encoded at a time.
_PIECE = 1 << 16
_AT_A_TIME = 1 << 20
# Between two lines, else between two words.
_BORDERS = (re.compile(r"\n(?=[^\r\n])"), re.compile(r"(?<=\w)(?= \w)"))
_PROBE = 256
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def _library() -> ModuleType:
  """Imports the tokenizers library.

  Raises:
    InputError: it is not installed.
  """
  # On all cores; set, because the library warns at every fork if it has to decide by itself.
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
  try:
    import tokenizers
  except ImportError as error:
    raise InputError(
        f"a {HUGGING_FACE_FILE} needs the package tokenizers: pip install -e '.[hf]'"
    ) from error
  return tokenizers


def _is_librarys(error: BaseException) -> bool:
  """Returns whether the library raised it: it raises Exception itself, and panics beside that."""
  return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class HuggingFaceTokenizer:
  """A tokenizer.json that has an eos token.

  If it has no bos token, eos is a document's first token too. Decoding restores the text exactly
  if the file normalises nothing (byte-level BPE without a normalizer, as GPT-2's) and the text
  spells no special token.

  Attributes:
    content: the content of tokenizer.json.
    settings: the values of the tokenizer_config.json beside it; {} if there is none.
    vocab_size: the greatest id + 1, added tokens included.
  """

  def __init__(
      self, content: bytes, settings: Mapping[str, Any] | None = None, *,
      add_bos: bool | None = None,
  ) -> None:
    """Loads the file.

    Args:
      content: the content of tokenizer.json.
      settings: the values of tokenizer_config.json. `bos_token` and `eos_token` name those tokens;
        without these keys, they are found by the names that are usual.
      add_bos: whether bos goes before a text that a model reads. None takes `add_bos_token` of the
        settings, or without it, what the file's post-processor does.

    Raises:
      InputError: the tokenizers library is not installed.
      ValueError: `content` is not a tokenizer.json, or has no eos token.
    """
    tokenizers = _library()
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
      self._tokenizer.no_truncation()
      self._tokenizer.no_padding()
      if getattr(self._tokenizer.model, "dropout", None):
        self._tokenizer.model.dropout = None
      decoder = json.loads(content).get("decoder")
    except BaseException as error:
      if not _is_librarys(error):
        raise
      raise ValueError(f"not a {HUGGING_FACE_FILE}: {error}") from error
    self.content = content
    self.settings = dict(settings or {})
    self.vocab_size: int = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
    eos = self._find("eos_token", _EOS_NAMES)
    if eos is None:
      raise ValueError(
          'no eos token: expected "eos_token" in a tokenizer_config.json beside it, or a special '
          f"token {' or '.join(_EOS_NAMES[:3])}; its special tokens: {self._special() or 'none'}"
      )
    self._eos, self._bos = eos, self._find("bos_token", _BOS_NAMES) or eos
    self.eos_id: int = self._tokenizer.token_to_id(self._eos)
    self.bos_id: int = self._tokenizer.token_to_id(self._bos)
    self.fingerprint = digest(
        HUGGING_FACE_FILE, hashlib.sha256(content).digest(), self.bos_id, self.eos_id
    )
    self._spellings = self._find_spellings(decoder)
    if add_bos is None:
      add_bos = self.settings.get("add_bos_token")
    self.add_bos = add_bos if isinstance(add_bos, bool) else self._processor_adds_bos()

  def _special(self) -> list[str]:
    added = self._tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special]

  def _find(self, key: str, names: Sequence[str]) -> str | None:
    """Returns the token that the settings name, or the first usual one that there is."""
    if key not in self.settings:
      special = self._special()
      return next((name for name in names if name in special), None)
    token = self.settings[key]
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
      raise ValueError(f'"{key}" in tokenizer_config.json is {token!r}: expected a token')
    if name is not None and self._tokenizer.token_to_id(name) is None:
      raise ValueError(f'the "{key}" of tokenizer_config.json, {name!r}, is no token of it')
    return name

  def _find_spellings(self, decoder: Any) -> dict[int, str]:
    """Returns the tokens that give text, id -> the token as the library's decoder takes it."""
    added = self._tokenizer.get_added_tokens_decoder()
    hidden = {self.bos_id, self.eos_id, *(i for i, token in added.items() if token.special)}
    spellings = {i: token for token, i in self._tokenizer.get_vocab().items() if i not in hidden}
    if isinstance(decoder, dict) and decoder.get("type") == "ByteLevel":
      # This decoder takes every token for a spelling of bytes, in which "\u00e9" stands for the
      # byte E9. Added tokens are not spelt like that, and some would be garbled.
      level = _library().pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
      for i in added.keys() - hidden:
        spellings[i] = "".join(part for part, _ in level.pre_tokenize_str(added[i].content))
    return spellings

  def _processor_adds_bos(self) -> bool:
    try:
      plain, whole = (
          self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True)
      )
    except BaseException as error:  # No token for "a", or a post-processor that is damaged.
      if not _is_librarys(error):
        raise
      return False
    return whole[:1] == [self.bos_id] != plain[:1]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of the text; see the module for the tokens that it may spell."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, computed on all cores.

    Raises:
      InputError: the tokenizer has no tokens for a text, nor one for what is unknown.
    """
    result: list[list[int]] = [[] for _ in texts]
    pieces = [(place, piece) for place, text in enumerate(texts) for piece in self._pieces(text)]
    for group in _groups(pieces):
      ids = self._encode([piece for _, piece in group])
      for (place, _), part in zip(group, ids, strict=True):
        result[place] += part
    return result

  def _encode(self, texts: list[str]) -> list[list[int]]:
    def encode() -> list[list[int]]:
      batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
      return [encoding.ids for encoding in batch]

    try:
      return in_thread(encode)
    except BaseException as error:
      if not _is_librarys(error):
        raise
      raise InputError(
          f"{HUGGING_FACE_FILE} cannot encode this text: {error}. Expected a tokenizer with a "
          f"token for every text; the text begins with {texts[0][:60]!r}"
      ) from error

  def _pieces(self, text: str) -> Iterator[str]:
    """Cuts a long text between lines or words where the ids of both sides join to the whole's.

    Whether they do is tried on the text around the border: a tokenizer that marks the beginning of
    a text, for example, gives other ids, and its texts stay whole.
    """
    start = 0
    for low in range(_PIECE, len(text), _PIECE):
      for pattern in _BORDERS:
        found = pattern.search(text, low, low + _PIECE)
        if found and self._joins(text, found.end()):
          yield text[start : found.end()]
          start = found.end()
          break
    yield text[start:]

  def _joins(self, text: str, border: int) -> bool:
    left, right = text[border - _PROBE : border], text[border : border + _PROBE]
    whole, first, second = self._encode([left + right, left, right])
    return whole == first + second

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the ids; bytes that are not valid UTF-8 become U+FFFD.

    Special tokens, and ids that no token has, give no text. The spaces before punctuation stay,
    whatever tokenizer_config.json says of cleaning up.
    """
    tokens = [self._spellings[i] for i in map(int, ids) if i in self._spellings]
    decoder = self._tokenizer.decoder
    return " ".join(tokens) if decoder is None else decoder.decode([*_apart(tokens)])

  def files(self) -> dict[str, bytes]:
    """Returns tokenizer.json as it was read, and the description, with all that it said before."""
    values = {**self.settings, "bos_token": self._bos, "eos_token": self._eos,
              "add_bos_token": self.add_bos}
    return {HUGGING_FACE_FILE: self.content, **description("huggingface", **values)}

  def save(self, directory: epath.Path) -> None:
    """Writes `files`."""
    write_files(directory, self.files())


def _groups(pieces: Sequence[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
  group: list[tuple[int, str]] = []
  size = 0
  for piece in pieces:
    group.append(piece)
    size += len(piece[1])
    if size >= _AT_A_TIME:
      yield group
      group, size = [], 0
  if group:
    yield group


def _apart(tokens: Sequence[str]) -> Iterator[str]:
  """Yields the tokens, with an empty one between the characters that byte tokens (<0x0A>) spell.

  The library decodes a run of byte tokens as a whole: half a character at its end would take the
  line end before it along.
  """
  left: int | None = None  # Bytes that the character still needs; None: no byte came before.
  for token in tokens:
    found = _BYTE.fullmatch(token)
    if found is None:
      left = None
    else:
      byte = int(found[1], 16)
      if left and byte & 0xC0 == 0x80:
        left -= 1
      else:
        if left is not None:
          yield ""
        left = (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
    yield token
