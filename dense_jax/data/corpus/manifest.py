"""The manifest of a corpus, and what else lies in its folder.

    manifest.json       written last: a folder with one is whole
    tokenizer/          the tokenizer
    shards/             the shards and their indexes
    starts/             of each stream, the first id and the text's bytes of each document
    job.json, files/    what the job was, and the result of each input file

A stream is what is read in a row: the documents of one part to train on, or all held-out ones.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_jax.data.cache import digest
from dense_jax.data.corpus.shards import Shard
from dense_jax.errors import InputError
from dense_jax.files import read_object, write_atomically

MANIFEST, JOB = "manifest.json", "job.json"
TOKENIZER, SHARDS, STARTS = "tokenizer", "shards", "starts"
# Of each stream: the first id of each document, and the bytes of its text.
STARTS_ENDS = (".starts", ".bytes")
# Increases whenever documents are laid out differently.
FORMAT = 1
_VALID = "the manifest of a corpus that prepare wrote"


@dataclasses.dataclass(frozen=True)
class Source:
  """An input file.

  Attributes:
    name: its path below the folder of all inputs.
    heldout: whether --heldout named it.
    size: in bytes.
    sha256: of its content.
    documents: those that were taken from it.
    bad: lines that are no documents.
    duplicates: documents that came before, in it or in another file.
    empty: documents without text.
  """

  name: str
  heldout: bool
  size: int
  sha256: str
  documents: int
  bad: int
  duplicates: int
  empty: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """A whole corpus.

  Attributes:
    tokenizer: the tokenizer's fingerprint.
    vocab_size: its number of ids.
    settings: how files were read and documents were chosen, as JSON values.
    sources: the input files, in order.
    shards: all shards, in order.
    starts: name of each file in the folder of starts -> SHA-256 of its content.
  """

  tokenizer: str
  vocab_size: int
  settings: Mapping[str, Any]
  sources: Sequence[Source]
  shards: Sequence[Shard]
  starts: Mapping[str, str]

  @property
  def streams(self) -> dict[str, tuple[Shard, ...]]:
    """Name of each stream, "train-PART" or "heldout" -> its shards."""
    streams: dict[str, list[Shard]] = {}
    for shard in self.shards:
      streams.setdefault("heldout" if shard.heldout else f"train-{shard.part}", []).append(shard)
    return {name: tuple(streams[name]) for name in sorted(streams)}

  def stream_digest(self, name: str) -> str:
    """Hex digest of a stream's documents, in their order."""
    return digest(
        "stream", FORMAT, self.tokenizer, *(shard.content for shard in self.streams[name])
    )

  @property
  def order(self) -> str:
    """Hex digest of the order of all documents: the corpus's fingerprint."""
    pairs = ((name, self.stream_digest(name)) for name in self.streams)
    return digest("corpus", FORMAT, *(text for pair in pairs for text in pair))

  def write(self, folder: Path) -> None:
    """Writes the manifest atomically."""
    streams = {
        name: {
            "documents": sum(shard.documents for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "text_bytes": sum(shard.text_bytes for shard in shards),
            "shards": [dataclasses.asdict(shard) for shard in shards],
        }
        for name, shards in self.streams.items()
    }
    values = {
        "format": FORMAT, "order": self.order, "tokenizer": self.tokenizer,
        "vocab_size": self.vocab_size, "settings": dict(self.settings),
        "starts": dict(self.starts), "streams": streams,
        "sources": [dataclasses.asdict(source) for source in self.sources],
    }
    content = json.dumps({"check": _check(values), **values}, indent=1) + "\n"
    write_atomically(folder / MANIFEST, content.encode())


def _check(values: Mapping[str, Any]) -> str:
  """Returns the digest of a manifest's values, by which a damaged one is known."""
  return digest("manifest", json.dumps(values, sort_keys=True))


def read_manifest(folder: Path) -> Manifest:
  """Reads a folder's manifest.

  Raises:
    InputError: it cannot be read, is another version's, or is damaged: a value is not of its kind,
      or a digest is not that of what it is of.
  """
  file = folder / MANIFEST
  values = read_object(file, _VALID)
  if values.get("format") != FORMAT:
    raise InputError(f"{file}: format = {values.get('format')!r} is not valid: expected {FORMAT}, "
                     "which this version of the program reads")
  try:
    if values.pop("check", None) != _check(values):
      raise ValueError("its values are not those of its check")
    manifest = Manifest(
        _typed(values, "tokenizer", str), _typed(values, "vocab_size", int),
        _typed(values, "settings", dict),
        [from_json(Source, source) for source in _typed(values, "sources", list)],
        [
            from_json(Shard, shard)
            for stream in _typed(values, "streams", dict).values()
            for shard in _typed(stream, "shards", list)
        ],
        {name: _typed(values["starts"], name, str) for name in _typed(values, "starts", dict)},
    )
    if manifest.vocab_size < 1 or not {"heldout"} < {*manifest.streams}:
      raise ValueError("it has no training text, or none that is held out")
    if {*manifest.starts} != {name + end for name in manifest.streams for end in STARTS_ENDS}:
      raise ValueError("its starts are not those of its streams")
    if manifest.order != values.get("order"):
      raise ValueError("its shards are not those of its order")
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(f"{file} is damaged ({error}): expected {_VALID}") from error
  return manifest


def _typed(values: Any, key: str, kind: type) -> Any:
  value = values[key] if isinstance(values, dict) else None
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ValueError(f"{key} is no {kind.__name__}")
  return value


def from_json(kind: type, values: Any) -> Any:
  """Makes a dataclass of plain fields from a JSON object.

  Raises:
    ValueError: a field is missing, is of another type, or is one too many.
  """
  if not isinstance(values, dict):
    raise ValueError(f"a {kind.__name__.lower()} is no object")
  fields = {field.name: field.type for field in dataclasses.fields(kind)}
  if values.keys() != fields.keys():
    raise ValueError(f"a {kind.__name__.lower()} has other keys than {', '.join(fields)}")
  return kind(**{name: _typed(values, name, _type(fields[name])) for name in fields})


def _type(annotation: Any) -> type:
  return {str: str, int: int, bool: bool}[annotation]
