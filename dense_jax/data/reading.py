"""Reads the documents of a text file: decompresses, decodes and cuts it into lines.

A file is read as a stream of chunks of bounded size. A small compressed file that unpacks to a
huge one, or a line that never ends, therefore hits a limit before memory runs out. A file that
is cut off is an error.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dense_jax.config import invalid
from dense_jax.data.finding import readable, warn_once

MAX_TEXT_BYTES = 1 << 30
MAX_LINE_BYTES = 128 << 20
# A zstd frame may ask for a window of this size, which is what `zstd --long` writes.
_MAX_WINDOW_BYTES = 128 << 20
_CHUNK_BYTES = 1 << 20
# So much input becomes at most 8 MiB: a zstd block of 4 bytes can encode 131,072 equal bytes.
_ZSTD_BYTES = 1 << 8
# Parsed as floats, integers of any number of digits are accepted.
_JSON = json.JSONDecoder(parse_int=float)
ValueT = TypeVar("ValueT")
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_texts(file: Path, field: str) -> Iterator[tuple[str, str]]:
  """Yields (suffix of the document's name, text) for each document of a file.

  A .txt or .py file is one document. Each line of a .jsonl that is not blank is a JSON object,
  and its string `text` is a document (the last one, if the key is repeated); other keys are
  ignored. A file may be UTF-16 or UTF-32 if it begins with a byte order mark. Bytes of a .txt
  that are not valid UTF-8 become U+FFFD, and a warning gives their number.

  Args:
    file: the file; its suffix determines how it is read.
    field: the config field that named it, for error messages.

  Raises:
    InputError: the file cannot be read or decoded, is compressed and cut off, has a line of
      more than 128 MiB or a line that is not a JSON object with a `text`, or is a .txt of more
      than 1 GiB. The error names the file and, where it applies, the line.
  """
  if file.suffix not in (".txt", ".py"):
    yield from read_lines(file, field, 'a JSON object with a string "text"', _text_of)
    return
  with named_errors(file, field), file.open("rb") as raw:
    yield "", _whole_text(raw, file, field)


def read_lines(
    file: Path, field: str, valid: str, take: Callable[[Any], ValueT],
    on_bad: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, ValueT]]:
  """Yields (":" and the line's number, value) for each line of a .jsonl that is not blank.

  Args:
    file: the file; its suffix says how it is compressed.
    field: the config field that named it, for error messages.
    valid: says what every line has to be.
    take: makes the value of a line's parsed JSON, whose numbers are all floats; raises ValueError
      with the reason if the JSON is something else.
    on_bad: called with ":" and the number of each line that is not what it has to be, and with the
      reason; the line is then passed over. None means that it is an error.

  Raises:
    InputError: see `read_texts`; a line is not what it has to be.
  """
  with named_errors(file, field), file.open("rb") as raw:
    lines = _Lines(file, _as_utf8(_decompressed(raw, file.suffix)), field)
    for number, line in enumerate(io.BufferedReader(lines, _CHUNK_BYTES), 1):
      line = line.removeprefix(codecs.BOM_UTF8)
      if not line.strip():
        continue
      try:
        value = take(_parse(line))
      except ValueError as error:
        if on_bad is not None:
          on_bad(f":{number}", str(error) or f"it is not {valid}")
          continue
        why = f" ({error})" if str(error) else ""
        raise invalid(
            field, str(file), f"{valid} in every line; line {number} is {line[:60]!r}{why}"
        ) from error
      yield f":{number}", value


@contextlib.contextmanager
def named_errors(file: Path, field: str) -> Iterator[None]:
  """Turns what goes wrong in reading the file into an InputError."""
  try:
    yield
  except UnicodeDecodeError as error:
    valid = f"text in {error.encoding}, as its byte order mark says ({error.reason})"
    raise invalid(field, str(file), valid) from error
  except (OSError, EOFError, zlib.error) as error:
    raise invalid(field, str(file), f"a file that can be read ({error})") from error


def _chunks(raw: BinaryIO | gzip.GzipFile, size: int) -> Iterator[bytes]:
  return iter(lambda: raw.read(size), b"")


def _decompressed(raw: BinaryIO, suffix: str) -> Iterator[bytes]:
  if suffix == ".gz":
    return _gzip_chunks(raw)
  return _zstd_chunks(raw) if suffix == ".zst" else _chunks(raw, _CHUNK_BYTES)


def _gzip_chunks(raw: BinaryIO) -> Iterator[bytes]:
  """Yields the content of all gzip members; zeros may follow the last one.

  Raises:
    EOFError: the file is empty or ends inside a member.
    OSError, zlib.error: the file is damaged or not gzip.
  """
  with gzip.open(raw, "rb") as unpacked:
    yield from _chunks(unpacked, _CHUNK_BYTES)
  if not raw.tell():
    raise EOFError("it is empty, which no whole gzip file is")


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
  """Yields the content of all zstd frames; a file that was written in parts has several.

  Raises:
    EOFError: the file is empty or ends inside a frame.
    OSError: the file is damaged, is not zstd, or needs a window of more than 128 MiB.
  """
  import zstandard  # An optional dependency, needed for .zst only.

  decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
  frame = None
  number = 0
  try:
    for packed in _chunks(raw, _ZSTD_BYTES):
      while packed:
        if frame is None:
          frame = decompressor.decompressobj()
          number += 1
        yield frame.decompress(packed)
        packed = frame.unused_data
        if frame.eof:
          frame = None
  except zstandard.ZstdError as error:
    raise OSError(str(error)) from error
  if frame is not None or not number:
    raise EOFError(
        f"it ends inside its frame {number}" if number
        else "it is empty, which no whole zstd file is"
    )


def _marked_encoding(begin: bytes) -> str | None:
  """Returns the encoding that a byte order mark of UTF-16 or UTF-32 announces; None means none."""
  return next((encoding for mark, encoding in _MARKS if begin.startswith(mark)), None)


def _as_utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
  """Converts a stream that begins with a byte order mark of UTF-16 or UTF-32 to UTF-8.

  Other streams are passed through.

  Raises:
    UnicodeDecodeError: the stream is not valid in the encoding that its mark announces.
  """
  begin = b""
  while len(begin) < 4 and (chunk := next(chunks, b"")):
    begin += chunk
  stream = itertools.chain([begin], chunks)
  encoding = _marked_encoding(begin)
  if not encoding:
    yield from stream
    return
  decoder = codecs.getincrementaldecoder(encoding)()
  for chunk in stream:
    yield decoder.decode(chunk).encode()
  yield decoder.decode(b"", final=True).encode()


def _whole_text(raw: BinaryIO, file: Path, field: str) -> str:
  size = raw.seek(0, io.SEEK_END)
  if size > MAX_TEXT_BYTES:
    raise invalid(
        field, str(file), f"a text of at most {MAX_TEXT_BYTES >> 20:,} MiB (it has "
        f"{size >> 20:,}): cut it into several files, or into documents, the lines of a .jsonl",
    )
  raw.seek(0)
  content = raw.read()
  encoding = _marked_encoding(content[:4])
  if encoding:
    return content.decode(encoding)
  if content.count(0) > len(content) // 8:
    raise invalid(
        field, str(file), "text; it is full of NUL bytes, as UTF-16 and UTF-32 are, but has no "
        "byte order mark that says so: write it in UTF-8",
    )
  try:
    return content.decode()
  except UnicodeDecodeError:
    text = content.decode(errors="replace")
  # Subtract the U+FFFD that the file itself has: in UTF-8, those three bytes mean nothing else.
  count = text.count("\ufffd") - content.count("\ufffd".encode())
  warn_once(f"{readable(str(file))}: what is not UTF-8 in it became U+FFFD, in {count:,} places")
  return text


class _Lines(io.RawIOBase):
  """A raw file over a stream of chunks that rejects lines of more than `MAX_LINE_BYTES`."""

  def __init__(self, file: Path, chunks: Iterator[bytes], field: str) -> None:
    self._file, self._chunks, self._field = file, chunks, field
    self._chunk = memoryview(b"")
    self._number, self._length = 1, 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
    while not self._chunk:
      chunk = next(self._chunks, None)
      if chunk is None:
        return 0
      self._check(chunk)
      self._chunk = memoryview(chunk)
    count = min(len(buffer), len(self._chunk))
    buffer[:count] = self._chunk[:count]
    self._chunk = self._chunk[count:]
    return count

  def _check(self, chunk: bytes) -> None:
    """Raises InputError if the line that `chunk` continues is too long.

    A line that begins and ends in one chunk is not checked: a chunk is far below the limit.
    """
    ends = chunk.count(b"\n")
    if self._length + (chunk.find(b"\n") if ends else len(chunk)) > MAX_LINE_BYTES:
      raise invalid(
          self._field, str(self._file),
          f"lines of at most {MAX_LINE_BYTES >> 20:,} MiB; line {self._number} is longer",
      )
    self._number += ends
    self._length = len(chunk) - chunk.rfind(b"\n") - 1 if ends else self._length + len(chunk)


def _parse(line: bytes) -> Any:
  """Parses a line; raises ValueError with the reason if it is not JSON."""
  try:
    return _JSON.decode(line.decode())
  except RecursionError as error:
    raise ValueError("it is nested too deeply to be read") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"byte {error.start + 1} is not UTF-8") from error
  except json.JSONDecodeError as error:
    raise ValueError(f"{error.msg}, at character {error.pos + 1}") from error


def _text_of(value: Any) -> str:
  text = value.get("text") if isinstance(value, dict) else None
  if not isinstance(text, str):
    raise ValueError
  return whole_characters(text)


def whole_characters(text: str) -> str:
  """Replaces halves of surrogate pairs, which JSON can spell, but which are not text."""
  return text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace")
