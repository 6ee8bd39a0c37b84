"""The tokenizer of a synthetic task: ids and their names."""

from collections.abc import Sequence

from etils import epath

from dense_jax.data.cache import digest
from dense_jax.data.tokenizer_files import description, write_files
from dense_jax.errors import InputError


class IdTokenizer:
  """Names of ids with spaces between. Id 0, the task's blank, is also bos and eos."""

  bos_id = 0
  eos_id = 0
  add_bos = False

  def __init__(self, names: Sequence[str]) -> None:
    """Stores the names.

    Args:
      names: the name of each id, all of them different and without spaces.

    Raises:
      ValueError: they are not.
    """
    if not names or len(set(names)) < len(names) or any(name.split() != [name] for name in names):
      raise ValueError("the names of ids are not different words")
    self.names = tuple(names)
    self._ids = {name: id for id, name in enumerate(names)}

  @property
  def vocab_size(self) -> int:
    """The number of names."""
    return len(self.names)

  @property
  def fingerprint(self) -> str:
    """Hex digest of the names."""
    return digest("ids", *self.names)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of names with white space between.

    Raises:
      InputError: a word is no name.
    """
    words = text.split()
    unknown = next((word for word in words if word not in self._ids), None)
    if unknown is not None:
      shown = " ".join(self.names[:12]) + (" ..." if len(self.names) > 12 else "")
      raise InputError(
          f"the model knows no word {unknown!r}: expected names of its task's ids, {shown}"
      )
    return [self._ids[word] for word in words]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the names of ids with spaces between; ids outside the vocabulary have none."""
    return " ".join(self.names[id] for id in ids if 0 <= id < len(self.names))

  def files(self) -> dict[str, bytes]:
    """Returns the description, which has the names."""
    return description("ids", add_bos_token=False, names=list(self.names))

  def save(self, directory: epath.Path) -> None:
    """Writes `files`."""
    write_files(directory, self.files())
