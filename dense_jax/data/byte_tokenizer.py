"""The tokenizer of bytes, which needs no file."""

from collections.abc import Sequence

from etils import epath

from dense_jax.data.cache import digest
from dense_jax.data.tokenizer_files import description, write_files

_BYTES_AT_A_TIME = 1 << 20


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

  def files(self) -> dict[str, bytes]:
    """Returns the description alone."""
    return description("bytes", add_bos_token=True)

  def save(self, directory: epath.Path) -> None:
    """Writes `files`."""
    write_files(directory, self.files())
