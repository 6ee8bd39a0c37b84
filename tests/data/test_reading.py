"""Reading files: encodings, compressed files that are cut off, limits, JSON."""

import gzip
import io
import json
import logging
import os
import re
import struct
import tracemalloc

import pytest
import zstandard

from dense_jax.data import reading, sources
from dense_jax.errors import InputError

TEXT = "plain words, na\u00efve caf\u00e9 \u65e5\u672c \U0001f600\r\nend\n"


def _read(file) -> list[str]:
  return [document.text for document in sources.find(str(file), "config.data.path")]


def _refusal(file) -> str:
  with pytest.raises(InputError) as error:
    _read(file)
  assert str(error.value).startswith("config.data.path = ") and file.name in str(error.value)
  return str(error.value)


def _jsonl(*texts: str) -> bytes:
  return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


MARKED = {name: ("\ufeff" + TEXT).encode(name)
          for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")}


@pytest.mark.parametrize("name", MARKED)
def test_a_byte_order_mark_is_obeyed(tmp_path, name):
  (tmp_path / "a.txt").write_bytes(MARKED[name])
  assert _read(tmp_path / "a.txt") == [TEXT]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("name", MARKED)
def test_marked_lines_are_read_in_every_packing(tmp_path, monkeypatch, name, pack):
  monkeypatch.setattr(reading, "_CHUNK_BYTES", 3)  # Characters span chunks.
  suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[pack]
  file = tmp_path / f"a.jsonl{suffix}"
  lines = "\ufeff" + json.dumps({"text": TEXT}, ensure_ascii=False) + '\r\n\r\n{"text": "b"}'
  file.write_bytes(pack(lines.encode(name)))
  assert _read(file) == [TEXT, "b"]


@pytest.mark.parametrize(("content", "message"), [
    ("\ufeff{}".encode("utf-16-le")[:-1], "text in utf-16"),
    ("\ufeff{}".encode("utf-16-be")[:-1], "text in utf-16"),
    ("\ufeff{}".encode("utf-32-le")[:-2], "text in utf-32"),
    ("\ufeff{}".encode("utf-32-be")[:-3], "text in utf-32"),
    (b"\xff\xfe" + b"a\0" + b"\x00\xd8" + b"b\0", "text in utf-16"),  # Half of a pair.
    (b"\xfe\xff" + b"\xdc\x00" + b"\0b", "text in utf-16"),
    (b"\0\0\xfe\xff" + b"\0\x11\0\0", "text in utf-32"),  # Beyond Unicode.
    (b"\xff\xfe\0\0" + b"abc", "text in utf-32"),
])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_what_does_not_fit_its_mark_is_named(tmp_path, suffix, content, message):
  (tmp_path / f"a{suffix}").write_bytes(content)
  assert message in _refusal(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("name", MARKED)
def test_text_full_of_nuls_is_named(tmp_path, name):
  (tmp_path / "a.txt").write_bytes("no mark at all\n".encode(name))
  assert "full of NUL bytes" in _refusal(tmp_path / "a.txt")
  (tmp_path / "b.jsonl").write_bytes(_jsonl("a").decode().encode(name))
  assert "line 1 is b'" in _refusal(tmp_path / "b.jsonl")


def test_utf8_marks(tmp_path):
  """A .txt keeps its UTF-8 byte order mark; before JSON lines it is dropped."""
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
  assert _read(tmp_path / "a.txt") == ["\ufeffa"]
  joined = b"\xef\xbb\xbf" + _jsonl("1") + b"\xef\xbb\xbf\n\xef\xbb\xbf" + _jsonl("2")
  (tmp_path / "b.jsonl").write_bytes(joined)
  assert _read(tmp_path / "b.jsonl") == ["1", "2"]


def test_undecodable_bytes_are_counted_once_a_file(tmp_path, caplog):
  (tmp_path / "a.txt").write_bytes("\ufffd ".encode() + b"caf\xe9, \xff\xfe \xe2\x82")
  (tmp_path / "b.txt").write_bytes(TEXT.encode())
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      assert _read(tmp_path)[0] == "\ufffd caf\ufffd, \ufffd\ufffd \ufffd"
  (record,) = caplog.records
  assert "a.txt: what is not UTF-8 in it became U+FFFD, in 4 places" in record.message


def _gzip_named(content: bytes) -> bytes:
  packed = io.BytesIO()
  with gzip.GzipFile("name.jsonl", "wb", fileobj=packed, mtime=1) as file:
    file.write(content)
  return packed.getvalue()


def _zstd_flushed(content: bytes) -> bytes:
  """Compresses to one frame of several blocks that does not record the size of its content."""
  packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
  half = content.index(b"\n") + 1
  blocks = packer.compress(content[:half]) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
  return blocks + packer.compress(content[half:]) + packer.flush()


PARTS = [_jsonl("one", "two"), _jsonl("three" * 50, ""), _jsonl("four", "five")]
SKIPPED = struct.pack("<II", 0x184D2A50, 5) + b"notes"
FRAMINGS = {
    "gz": [gzip.compress(part, mtime=0) for part in PARTS],
    "gz, one member": [gzip.compress(b"".join(PARTS), mtime=0)],
    "gz, with names": [_gzip_named(part) for part in PARTS],
    "gz, stored": [gzip.compress(part, 0, mtime=0) for part in PARTS],
    "zst": [zstandard.compress(part) for part in PARTS],
    "zst, one frame": [zstandard.compress(b"".join(PARTS))],
    "zst, with checksums":
        [zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in PARTS],
    "zst, without sizes": [_zstd_flushed(part) for part in PARTS],
    "zst, skippable frames":
        [x for part in PARTS for x in (SKIPPED, zstandard.compress(part), SKIPPED[:4] + bytes(4))],
    "zst, empty frames": [zstandard.compress(b""), *map(zstandard.compress, PARTS)],
}


@pytest.mark.parametrize(("framing", "piece"), [
    *((framing, 256) for framing in FRAMINGS),
    *((framing, 1) for framing in FRAMINGS if framing.startswith("zst")),
])
def test_a_file_cut_at_any_byte_is_named_or_is_whole_frames(tmp_path, monkeypatch, framing, piece):
  monkeypatch.setattr(reading, "_ZSTD_BYTES", piece)
  frames, suffix = FRAMINGS[framing], framing.partition(",")[0]
  whole, file = b"".join(frames), tmp_path / f"a.jsonl.{suffix}"
  unpacked = {"gz": gzip.decompress,
              "zst": lambda frame: zstandard.ZstdDecompressor().decompressobj().decompress(frame)}
  expected = {0: None}
  lines = b""
  for number, frame in enumerate(frames, 1):
    lines += unpacked[suffix](frame)
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    expected[len(b"".join(frames[:number]))] = [text for text in texts if text]
  for cut in range(len(whole) + 1):
    file.write_bytes(whole[:cut])
    if expected.get(cut) is None:
      assert "a file that can be read (" in _refusal(file)
    else:
      assert _read(file) == expected[cut]
  assert _read(file) == ["one", "two", "three" * 50, "four", "five"]


@pytest.mark.parametrize("suffix, tail, readable", [
    ("gz", b"\0", True), ("gz", bytes(512), True),  # Padding with zeros, as on tapes.
    ("gz", b"x", False), ("gz", b"garbage", False), ("gz", b"\n", False), ("gz", b"\x1f", False),
    ("zst", b"\0", False), ("zst", bytes(512), False), ("zst", b"\n", False),
    ("zst", b"garbage", False), ("zst", b"\x28\xb5", False),
])
def test_what_follows_the_last_frame(tmp_path, suffix, tail, readable):
  file = tmp_path / f"a.jsonl.{suffix}"
  file.write_bytes(FRAMINGS[suffix][0] + tail)
  if readable:
    assert _read(file) == ["one", "two"]
  else:
    assert "a file that can be read (" in _refusal(file)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("content", [_jsonl("plain"), bytes(100), b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_another_kind_of_file_is_named(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  assert "a file that can be read (" in _refusal(tmp_path / name)


@pytest.mark.parametrize("framing", ["gz, one member", "zst, with checksums"])
def test_a_flipped_bit_is_named_or_harmless(tmp_path, framing):
  """A flip is harmless in fields that do not affect the content, such as a header's time."""
  whole, suffix = b"".join(FRAMINGS[framing]), framing.partition(",")[0]
  file = tmp_path / f"a.jsonl.{suffix}"
  for place in range(len(whole)):
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    try:
      assert _read(file) == ["one", "two", "three" * 50, "four", "five"], place
    except InputError as error:
      assert file.name in str(error)


def _peak(function) -> int:
  tracemalloc.start()
  try:
    function()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("begin", [b"", b'{"text": "one"}\n\n{"text": "'])
def test_a_line_that_does_not_end_meets_a_limit(tmp_path, monkeypatch, suffix, begin):
  monkeypatch.setattr(reading, "MAX_LINE_BYTES", 8 << 20)
  content = begin + b"x" * (100 << 20)
  pack = {"": bytes, ".gz": lambda c: gzip.compress(c, 1), ".zst": zstandard.compress}[suffix]
  file = tmp_path / f"a.jsonl{suffix}"
  file.write_bytes(pack(content))
  del content
  message = []
  assert _peak(lambda: message.append(_refusal(file))) < 80 << 20
  line = 3 if begin else 1
  assert f"lines of at most 8 MiB; line {line} is longer" in message[0]


def test_lines_of_any_length_below_the_limit_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(reading, "MAX_LINE_BYTES", 64)
  monkeypatch.setattr(reading, "_CHUNK_BYTES", 16)
  lines = ['{"text": "%s"}' % ("x" * n) for n in (1, 4, 20, 52, 1, 52)]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  assert [len(text) for text in _read(tmp_path / "a.jsonl")] == [1, 4, 20, 52, 1, 52]
  (tmp_path / "b.jsonl").write_text("\n".join([*lines, '{"text": "%s"}' % ("x" * 53), "{}"]))
  assert "lines of at most 0 MiB; line 7 is longer" in _refusal(tmp_path / "b.jsonl")


def test_a_text_beyond_the_limit_is_not_read(tmp_path):
  (tmp_path / "a.txt").touch()
  os.truncate(tmp_path / "a.txt", reading.MAX_TEXT_BYTES + 1)
  message = []
  assert _peak(lambda: message.append(_refusal(tmp_path / "a.txt"))) < 1 << 20
  assert "a text of at most 1,024 MiB" in message[0]


def test_a_giant_window_is_refused(tmp_path):
  options = zstandard.ZstdCompressionParameters(window_log=30)
  packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
  (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(_jsonl("x")) + packer.flush())
  assert "too much memory" in _refusal(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("value", [
    "9" * 5000, "-" + "9" * 5000, "[" * 200 + "]" * 200, "NaN", "-Infinity", "1e999", "null",
    '{"text": 3}', '"\\ud800"', "[1, 2.5, true]", "12345678901234567890",
])
def test_other_fields_do_not_matter(tmp_path, value):
  lines = f'{{"text": "a", "m": {value}}}\r\n  \n\n{{"m": {value}, "text": "b"}}'
  (tmp_path / "a.jsonl").write_text(lines)
  assert _read(tmp_path / "a.jsonl") == ["a", "b"]


@pytest.mark.parametrize("depth", [1500, 100_000])
@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}")])
def test_deep_nesting_is_read_or_said(tmp_path, depth, brackets):
  value = brackets[0] * depth + ("1" if brackets[0] != "[" else "") + brackets[1] * depth
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "m": ' + value + "}\n")
  try:
    assert _read(tmp_path / "a.jsonl") == ["a", "b"]
  except InputError as error:
    assert re.search(r"a\.jsonl.*line 2 is b'.*nested too deeply", str(error))


@pytest.mark.parametrize(("line", "why"), [
    (b'{"text": 3}', ""), (b'{"text": 99999999999999999999}', ""), (b'{"text": null}', ""),
    (b'{"text": ["a"]}', ""), (b'"text"', ""), (b"[1]", ""), (b"{}", ""), (b"3", ""),
    (b'{"text": "a", "text": 1}', ""),
    (b'{"text": "a"', "Expecting ',' delimiter, at character"),
    (b'{"text": "a"} {"text": "b"}', "Extra data, at character 15"),
    (b'{"text": "\xe9"}', "byte 11 is not UTF-8"),
    (b'{"text": "\x00"}', "Invalid control character"),
])
def test_lines_that_are_no_document_are_named(tmp_path, line, why):
  (tmp_path / "a.jsonl").write_bytes(_jsonl("a", "b") + line + b"\n")
  message = _refusal(tmp_path / "a.jsonl")
  assert 'a JSON object with a string "text" in every line; line 3 is b' in message
  assert why in message


def test_the_last_of_several_texts_is_taken(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": 1, "text": "a", "text": "b"}')
  assert _read(tmp_path / "a.jsonl") == ["b"]
