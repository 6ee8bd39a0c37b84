"""A small corpus for tests: files of all kinds, and how they are prepared."""

import gzip
import json
from pathlib import Path

import zstandard

from dense_jax.cli import prepare

DOCUMENTS = [f"document {number} of the corpus\n" + f"line {number} é🙂\n" * (number % 23)
             for number in range(120)]
NAMES = ("Pile-CC", "Books3", "Github")


def lines(documents, begin=0) -> bytes:
  """Returns documents as a .jsonl, each of a set of The Pile."""
  return b"".join(
      json.dumps({"text": text, "meta": {"pile_set_name": NAMES[(begin + i) % 3]}}).encode() + b"\n"
      for i, text in enumerate(documents)
  )


def write_corpus(folder: Path) -> Path:
  """Writes the documents as .jsonl, .jsonl.gz and .jsonl.zst files, in this order."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "a.jsonl").write_bytes(lines(DOCUMENTS[:40]))
  (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(DOCUMENTS[40:80], 40)))
  (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines(DOCUMENTS[80:], 80)))
  return folder


def run(text: Path, output: Path, *options: str, tokenizer: str = "bytes") -> int:
  """Prepares a corpus with one worker."""
  return prepare.main([
      "--input", str(text), "--output", str(output), "--tokenizer", tokenizer, "--workers", "1",
      *options,
  ])


def files_of(folder):
  """Returns path -> content of all files of a corpus but its lock."""
  return {
      file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*")
      if file.is_file() and file.name != ".lock"
  }
