"""Encodes documents fast, with the very ids that `Tokenizer.encode` gives.

SentencePiece encodes a document as one sequence of characters that it merges pair by pair, in time
that grows faster than the document, and forgets everything after it. But a BPE model never merges
across two neighbouring characters that stand side by side in no piece of its vocabulary. A document
can therefore be cut there, into chunks of about a word, and each different chunk is encoded once.

The tests compare the ids with those of whole documents, for all kinds of models and texts. What is
not a BPE model is encoded whole.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from dense_jax.data.byte_tokenizer import ByteTokenizer
from dense_jax.data.sentencepiece_tokenizer import SPACE_MARK, SentencePieceTokenizer
from dense_jax.data.tokenizer import Tokenizer

# Characters that are cut at a time, which bounds the memory that a long document takes.
_WINDOW = 1 << 20
# Chunks that are remembered, of some 150 bytes each, before all are forgotten. A longer one hardly
# comes again: of a model whose pieces span words, most are sentences.
_MOST_KNOWN = 1 << 19
_LONGEST_KNOWN = 40
_BPE = 2
# A NormalizerSpec (field 3 of a ModelProto) that changes nothing: its name is "identity", and its
# table of characters and its three options are empty. Appended to a model, it replaces the model's.
_IDENTITY = b"\x0a\x08identity\x12\x00\x18\x00\x20\x00\x28\x00"
_NORMALIZER_SPEC = b"\x1a" + bytes([len(_IDENTITY)]) + _IDENTITY


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the type of stored ids: little-endian, of two bytes if they suffice, else of four."""
  return np.dtype("<u2" if vocab_size < 1 << 16 else "<u4")


class DocumentEncoder:
  """Texts -> the ids of documents, with bos and eos, as bytes."""

  def __init__(self, tokenizer: Tokenizer) -> None:
    """Prepares to encode by a tokenizer."""
    self._tokenizer = tokenizer
    self._dtype = token_dtype(tokenizer.vocab_size)
    self._begin, self._end = self._bytes([tokenizer.bos_id]), self._bytes([tokenizer.eos_id])
    self._chunks: _Chunks | None = None
    if isinstance(tokenizer, SentencePieceTokenizer) and _trainer_spec(tokenizer.model)[0] == _BPE:
      self._chunks = _Chunks(tokenizer.model, self._dtype)

  def __call__(self, texts: Sequence[str]) -> list[bytes]:
    """Returns bos, ids and eos of each text, each of `token_dtype`."""
    return [self._begin + ids + self._end for ids in self._encoded(texts)]

  def _encoded(self, texts: Sequence[str]) -> list[bytes]:
    if self._chunks is not None:
      assert isinstance(self._tokenizer, SentencePieceTokenizer)
      mark = self._bytes(self._tokenizer.mark_ids)
      return [
          mark.join(map(self._chunks.encode, text.split(SPACE_MARK) if mark else [text]))
          for text in texts
      ]
    if isinstance(self._tokenizer, ByteTokenizer):
      contents = (np.frombuffer(text.encode(), np.uint8) for text in texts)
      return [content.astype(self._dtype).tobytes() for content in contents]
    return [*map(self._bytes, self._tokenizer.encode_batch(texts))]

  def _bytes(self, ids: Sequence[int]) -> bytes:
    return np.asarray(ids, self._dtype).tobytes()


class _Chunks:
  """Encodes text by a BPE model, chunk by chunk, and remembers chunks."""

  def __init__(self, model: bytes, dtype: np.dtype) -> None:
    self._dtype = dtype
    self._normalizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model + _NORMALIZER_SPEC)
    self._known: dict[str, bytes] = {}
    pieces = [
        self._normalizer.id_to_piece(i) for i in range(self._normalizer.get_piece_size())
        if not self._normalizer.is_byte(i)
    ]
    characters = sorted(set("".join(pieces)))
    # Characters that no piece has are all of class 0.
    self._count = len(characters) + 1
    self._class_of = np.zeros(0x110000, np.int32)
    self._class_of[[*map(ord, characters)]] = np.arange(1, self._count)
    joined = np.zeros((self._count, self._count), bool)
    for piece in pieces:
      classes = self._class_of[[*map(ord, piece)]]
      joined[classes[:-1], classes[1:]] = True
    if not _trainer_spec(model)[1]:
      # Without bytes for what it does not know, a model makes one unknown id of many characters.
      single = self._class_of[[ord(piece) for piece in pieces if len(piece) == 1]]
      unknown = np.setdiff1d(np.arange(self._count), single)
      joined[unknown], joined[:, unknown] = True, True
    self._joined = joined.ravel()

  def encode(self, text: str) -> bytes:
    """Returns the ids of a text."""
    normal = self._normalizer.normalize(text)
    return b"".join([self._encode_chunks(chunks) for chunks in self._cut(normal)])

  def _cut(self, text: str) -> Iterator[list[str]]:
    """Yields lists of chunks, which together are the text."""
    low, size = 0, _WINDOW
    while low < len(text):
      part = text[low : low + size]
      class_N = self._class_of[np.frombuffer(part.encode("utf-32-le", "surrogatepass"), "<u4")]
      pair_N = class_N[:-1] * np.int64(self._count) + class_N[1:]
      borders = (np.flatnonzero(~self._joined[pair_N]) + 1).tolist()
      if low + len(part) == len(text):
        borders.append(len(part))
      if not borders:  # No border in the whole window.
        size *= 2
        continue
      yield [part[a:b] for a, b in zip([0, *borders], borders, strict=False)]
      low, size = low + borders[-1], _WINDOW

  def _encode_chunks(self, chunks: list[str]) -> bytes:
    known = self._known
    new = [chunk for chunk in set(chunks) if chunk not in known]
    for chunk, ids in zip(new, self._processor.encode(new, num_threads=1), strict=True):
      known[chunk] = np.asarray(ids, self._dtype).tobytes()
    encoded = b"".join([known[chunk] for chunk in chunks])
    for chunk in new:
      if len(chunk) > _LONGEST_KNOWN:
        del known[chunk]
    if len(known) > _MOST_KNOWN:
      known.clear()
    return encoded


def _trainer_spec(model: bytes) -> tuple[int, bool]:
  """Returns a model's type, and whether it spells what it does not know as bytes."""
  spec = b"".join(
      value for number, value in _fields(model) if number == 2 and isinstance(value, bytes)
  )
  values = dict(_fields(spec))
  kind, fallback = values.get(3, 1), values.get(35, 0)
  return (kind if isinstance(kind, int) else 1), bool(fallback)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Yields the number and the value of each field of a protocol buffer that was read before."""
  place = 0
  while place < len(message):
    key, place = _varint(message, place)
    number, kind = key >> 3, key & 7
    if kind == 0:
      value, place = _varint(message, place)
      yield number, value
      continue
    length, place = _varint(message, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
    yield number, message[place : place + length]
    place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = message[place]
    value |= (byte & 0x7F) << shift
    place, shift = place + 1, shift + 7
    if byte < 0x80:
      return value, place
