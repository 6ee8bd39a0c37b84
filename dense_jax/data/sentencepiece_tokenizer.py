"""SentencePiece models as tokenizers."""

import hashlib
from collections.abc import Sequence

import sentencepiece
from etils import epath

from dense_jax.data.background import in_thread
from dense_jax.data.cache import digest
from dense_jax.data.tokenizer_files import SENTENCEPIECE_FILE, description, write_files

# SentencePiece writes a space inside a piece as this character.
SPACE_MARK = "\u2581"


class SentencePieceTokenizer:
  """A SentencePiece model that has an eos piece; `model` holds its serialised form.

  If the model has no bos piece, eos is a document's first token too. `mark_ids` are the ids that
  stand for the space mark where a text has it, or [] where the model itself encodes it. Decoding
  restores the text exactly for models of `train_sentencepiece`; other models may normalise it.
  """

  def __init__(self, model: bytes, *, add_bos: bool = True) -> None:
    """Loads a serialised model.

    Args:
      model: the content of a .model file.
      add_bos: whether bos goes before a text that a model reads.

    Raises:
      ValueError: `model` is not a SentencePiece model, or has no eos piece.
    """
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise ValueError("not a SentencePiece model") from error
    self.model = model
    self.add_bos = add_bos
    self.vocab_size: int = self._processor.get_piece_size()
    self.eos_id: int = self._processor.eos_id()
    if self.eos_id < 0:
      raise ValueError("a SentencePiece model without an eos piece")
    bos_id: int = self._processor.bos_id()
    self.bos_id = self.eos_id if bos_id < 0 else bos_id
    self.fingerprint = digest(hashlib.sha256(model).digest())
    self.mark_ids = self._find_mark_ids()

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
    parts = text.split(SPACE_MARK) if self.mark_ids else [text]
    first, *rest = self._encode(parts)
    for ids in rest:
      first += self.mark_ids + ids
    return first

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text's pieces, computed on all cores."""
    batch = self._encode(texts)
    for index, text in enumerate(texts):
      if self.mark_ids and SPACE_MARK in text:
        batch[index] = self.encode(text)
    return batch

  def _encode(self, texts: Sequence[str]) -> list[list[int]]:
    return in_thread(lambda: self._processor.encode(list(texts), num_threads=-1))

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the pieces; bytes that are not valid UTF-8 become U+FFFD."""
    known = (int(i) for i in ids if 0 <= i < self.vocab_size)
    return self._processor.decode([i for i in known if not self._processor.is_control(i)])

  def files(self) -> dict[str, bytes]:
    """Returns tokenizer.model, the model unchanged, and the description."""
    described = description("sentencepiece", add_bos_token=self.add_bos)
    return {SENTENCEPIECE_FILE: self.model, **described}

  def save(self, directory: epath.Path) -> None:
    """Writes `files`."""
    write_files(directory, self.files())
