"""Tokenizers that tests can do by hand."""

from tests.builders import VOCAB


class Letters:
  """Spells each of a few ids with one, two or three letters, and the last with none."""

  vocab_size, bos_id, eos_id, add_bos = VOCAB, 0, VOCAB - 1, True
  fingerprint = "letters"
  pieces = ("a", "b", "cd", "e", "fgh", "i", "jk", "l", "mno", "p", "")

  def decode(self, ids):
    return "".join(self.pieces[i] for i in ids)
