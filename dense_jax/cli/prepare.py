"""Tokenizes a corpus into shards that training reads at random."""

import resource
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tqdm

from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.data.corpus import beam, job, workers
from dense_jax.data.corpus.documents import Reading
from dense_jax.data.corpus.files import Input, Settings
from dense_jax.data.corpus.manifest import Manifest
from dense_jax.errors import InputError
from dense_jax.files import is_remote, make_path, read_object
from dense_jax.formatting import scaled, table
from dense_jax.outputs import check_folder

_EPILOG = """
A run trains on the folder with
  --config.data.path=FOLDER
and mixes its parts by --config.data.mixture; see docs/data.md. The same command goes on with a job
that was killed, after the last file that was done.
"""


def main(arguments: Sequence[str]) -> int:
  """Prepares a corpus, and prints what it holds."""
  command = common.parser("prepare", "Tokenizes a corpus into shards, in constant memory.")
  command.epilog = _EPILOG
  command.add_argument("--input", required=True, metavar="GLOB", help="a file, folder or glob of "
                       ".txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files")
  command.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer as "
                       "config.data.tokenizer names it; or train:32000, which trains one of so "
                       "many pieces on the beginnings of the files")
  command.add_argument("--output", required=True, metavar="FOLDER", help="a new folder, or that of "
                       "the same job, which goes on")
  command.add_argument("--heldout", default="", metavar="GLOB", help="files whose documents are "
                       "held out; left out, documents of --input are")
  command.add_argument("--heldout-every", type=int, default=20, metavar="N", help="without "
                       "--heldout, one document in N is held out, by a hash of its text (20)")
  command.add_argument("--column", default="text", metavar="NAME", help="the key or the column "
                       "that has the text (text)")
  command.add_argument("--part-field", default="", metavar="KEY", help="the key that says which "
                       "part of the corpus a document belongs to, such as meta.pile_set_name")
  command.add_argument("--parts", default="", metavar="FILE.json", help="an object of that key's "
                       'values and parts\' names; "*" stands for all other values')
  command.add_argument("--deduplicate", action="store_true", help="leave out each document whose "
                       "text came before")
  command.add_argument("--most-bad", type=int, default=1000, metavar="N", help="lines that may be "
                       "no documents; each is counted and passed over (1000)")
  command.add_argument("--workers", type=int, default=0, metavar="N", help="processes that "
                       "encode; left out, one for each core")
  command.add_argument("--beam", default=None, metavar="FLAGS", help="prepare the files by an "
                       "Apache Beam pipeline with these flags: --beam='--runner=DirectRunner'")
  options = command.parse_args([*arguments])
  for name, least in (("heldout_every", 2), ("most_bad", 0), ("workers", 0)):
    if getattr(options, name) < least:
      raise invalid(f"--{name.replace('_', '-')}", getattr(options, name), f"an integer >= {least}")
  parts = {}
  if options.parts:
    file = Path(make_path(options.parts, "--parts"))
    valid = "an object of parts' names"
    try:
      parts = read_object(file, valid)
    except InputError as error:
      raise invalid("--parts", options.parts, f"a JSON file with {valid} ({error})") from error
  folder = check_folder(options.output, "--output")
  if is_remote(folder):
    raise invalid("--output", options.output, "a folder on this machine")
  wanted = job.Job(
      inputs=options.input, heldout=options.heldout, tokenizer=options.tokenizer,
      folder=Path(folder),
      settings=Settings(
          Reading(options.column, options.part_field, parts),
          0 if options.heldout else options.heldout_every, options.deduplicate,
      ),
      most_bad=options.most_bad, workers=options.workers or workers.usable_cores(),
  )
  begun = time.perf_counter()
  if options.beam is not None:
    try:
      flags = shlex.split(options.beam)
    except ValueError as error:
      raise invalid("--beam", options.beam, f"a pipeline's flags ({error})") from error
    beam.run_pipeline(wanted, flags)
  done = 0
  with tqdm.tqdm(unit="B", unit_scale=True, desc="preparing", leave=False,
                 disable=not sys.stderr.isatty()) as bar:

    def progress(file: Input, size: int) -> None:
      nonlocal done
      done += size
      bar.set_postfix_str(file.name[-40:], refresh=False)
      bar.update(size)

    manifest, peak = job.prepare(wanted, progress)
  print(_described(manifest))
  seconds = time.perf_counter() - begun
  if done:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\n{scaled(done, 'B')} of text in {seconds:.1f} s, {done / seconds / 1e6:.2f} MB/s by "
          f"{wanted.workers} workers; peak memory (RSS): {scaled(own, 'B')}, and "
          f"{scaled(peak, 'B')} of a worker")
  print(f"\ntrain with  --config.data.path={wanted.folder}")
  return 0


def _described(manifest: Manifest) -> str:
  rows = [("stream", "shards", "documents", "tokens", "text")]
  for name, shards in manifest.streams.items():
    rows.append((
        name, f"{len(shards):,}", f"{sum(shard.documents for shard in shards):,}",
        f"{sum(shard.tokens for shard in shards):,}",
        scaled(sum(shard.text_bytes for shard in shards), "B"),
    ))
  sources = manifest.sources
  counts = {
      "files": len(sources), "lines passed over": sum(source.bad for source in sources),
      "duplicates left out": sum(source.duplicates for source in sources),
      "empty documents": sum(source.empty for source in sources),
  }
  told = ", ".join(f"{count:,} {what}" for what, count in counts.items())
  return f"{table(rows)}\n\n{told}; {manifest.vocab_size:,} ids; order {manifest.order}"


if __name__ == "__main__":
  common.run(main)
