"""Prepares a corpus: all input files become shards, then the whole gets its manifest.

A job that was killed goes on with the first file that is not done. Files are read in their order,
by one process, which also writes; as many processes as there are cores encode.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from dense_jax.config import invalid
from dense_jax.data.corpus.documents import PartNames, check_packages, find_inputs, read_documents
from dense_jax.data.corpus.encoding import token_dtype
from dense_jax.data.corpus.files import (
    RESULTS,
    FileResult,
    FileWriter,
    Input,
    Settings,
    finished,
    hashes_file,
    input_path,
    read_groups,
    result_file,
)
from dense_jax.data.corpus.manifest import (
    FORMAT,
    JOB,
    MANIFEST,
    SHARDS,
    STARTS,
    STARTS_ENDS,
    TOKENIZER,
    Manifest,
    read_manifest,
)
from dense_jax.data.corpus.seen import Seen
from dense_jax.data.corpus.shards import INDEX_DTYPE, read_index
from dense_jax.data.corpus.workers import EncoderPool, InlineEncoder
from dense_jax.data.finding import file_key, readable
from dense_jax.data.tokenizer import Tokenizer, load_named_tokenizer, load_saved_tokenizer
from dense_jax.data.tokenizer_training import train_sentencepiece
from dense_jax.errors import InputError
from dense_jax.files import (
    PARTIALS,
    parse_json,
    read_object,
    sync,
    try_lock,
    whole_folder,
    write_atomically,
)

LOCK = ".lock"
_FIELD = "--tokenizer"
_TRAIN = "train:"
# A tokenizer is trained on the beginnings of so many files, of so many characters each at most.
_SAMPLED_FILES, _SAMPLED_CHARACTERS = 64, 1 << 24
_SHOWN_BAD = 20
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
  """A corpus that is to be prepared.

  Attributes:
    inputs: a file, directory or glob, of the text.
    heldout: the same of held-out text; "" holds out one document in `settings.heldout_every`.
    tokenizer: what `config.data.tokenizer` may be but for "train"; or "train:32000", which trains
      one of so many pieces.
    folder: the corpus's folder.
    settings: how files are read.
    most_bad: lines that may be no documents; with one more the job stops.
    workers: processes that encode.
  """

  inputs: str
  heldout: str
  tokenizer: str
  folder: Path
  settings: Settings
  most_bad: int
  workers: int

  def files(self) -> list[Input]:
    """Finds the input files, held-out ones first, so that a duplicate is never trained on.

    Raises:
      InputError: there are none, one cannot be read here, or is both trained on and held out.
    """
    found: list[Input] = []
    for path, field in ((self.heldout, "--heldout"), (self.inputs, "--input")):
      if not path and field == "--heldout":
        continue
      root, files = find_inputs(path, field)
      check_packages(files)
      for file in files:
        name = readable(file.relative_to(root).as_posix())
        found.append(Input(len(found), str(file), name, field == "--heldout"))
    held = {file_key(input_path(file)) for file in found if file.heldout}
    twice = next((file.path for file in found
                  if not file.heldout and file_key(input_path(file)) in held), None)
    if twice:
      raise invalid("--heldout", self.heldout, f"files that are not in --input as well, as {twice}")
    return found

  def described(self, files: Sequence[Input]) -> dict[str, Any]:
    """Returns all that may not change while a job goes on, as JSON values."""
    return {
        "format": FORMAT, "tokenizer": self.tokenizer,
        "settings": dataclasses.asdict(self.settings),
        "files": [[file.name, file.heldout] for file in files],
    }


@contextlib.contextmanager
def opened(job: Job, files: Sequence[Input]) -> Iterator[None]:
  """Makes the folder or goes on with it, as the only process.

  A job that has no tokenizer yet has made nothing; one of other options may take its place.

  Raises:
    InputError: the folder holds something else, or another job, or another process works on it, or
      there is no such tokenizer.
  """
  if not (job.folder / TOKENIZER).is_dir():
    _named_tokenizer(job)  # Before anything is written.
  held = {entry.name for entry in job.folder.iterdir()} if job.folder.is_dir() else set()
  others = {name for name in held if not name.startswith(".")}
  if others and JOB not in held:
    raise invalid("--output", str(job.folder), "a new or empty folder, or one of the same job; it "
                  f"holds {min(others)}")
  with _named_errors(job.folder):
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = (job.folder / LOCK).open("ab")
  with lock:
    if try_lock(lock) is False:
      raise invalid("--output", str(job.folder), "a folder that no other process works on")
    wanted = parse_json(json.dumps(job.described(files)))
    begun = (job.folder / JOB).is_file() and (
        (job.folder / TOKENIZER).is_dir() or any(job.folder.glob(f"{RESULTS}/*"))
    )
    if begun:
      before = read_object(job.folder / JOB, "what prepare wrote")
      different = [key for key in wanted if before.get(key) != wanted[key]]
      if different:
        raise invalid(
            "--output", str(job.folder), "a new folder, or the options and files that this one "
            f"was begun with; others are: {', '.join(different)}",
        )
    folders = [job.folder / name for name in (SHARDS, RESULTS)]
    with _named_errors(job.folder):
      if not begun:  # It comes first: it says whose the folder is.
        write_atomically(job.folder / JOB, (json.dumps(wanted, indent=1) + "\n").encode())
      for folder in folders:
        folder.mkdir(exist_ok=True)
      for left in itertools.chain.from_iterable(
          folder.glob(PARTIALS) for folder in (job.folder, *folders)
      ):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    yield


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise invalid(
        "--output", str(folder), f"a folder that can be written ({error.strerror or error}). What "
        "is done stays; the same command goes on",
    ) from error


def tokenizer_of(job: Job, files: Sequence[Input]) -> Tokenizer:
  """Loads the job's tokenizer, or trains it, and keeps it in the folder.

  Raises:
    InputError: it cannot be loaded or trained.
  """
  kept = job.folder / TOKENIZER
  if kept.is_dir():
    return load_saved_tokenizer(kept)
  tokenizer = _named_tokenizer(job)
  with _named_errors(job.folder), whole_folder(kept) as partial:
    if tokenizer is None:
      # In a file of the partial folder, which replaces the folder `kept` when all is written.
      model = partial / "model"
      number = int(job.tokenizer.removeprefix(_TRAIN))
      train_sentencepiece(_sample(job, files), number, model, _FIELD)
      tokenizer = load_named_tokenizer(str(model), _FIELD)
      model.unlink()
    tokenizer.save(epath.Path(partial))
  return tokenizer


def _named_tokenizer(job: Job) -> Tokenizer | None:
  """Loads the tokenizer that a job names; None means that it is to be trained."""
  if job.tokenizer == "train":
    raise invalid(_FIELD, job.tokenizer, "train:N, with N the number of pieces")
  number = job.tokenizer.removeprefix(_TRAIN)
  if number == job.tokenizer:
    return load_named_tokenizer(job.tokenizer, _FIELD, 'train:N, "bytes"')
  if not (number.isdecimal() and len(number) < 10):
    raise invalid(_FIELD, job.tokenizer, "train:N, with N < 1e9 the number of pieces")
  return None


def _sample(job: Job, files: Sequence[Input]) -> Iterator[str]:
  trained = [file for file in files if not file.heldout]
  for file in trained[:: -(-len(trained) // _SAMPLED_FILES)]:
    left = _SAMPLED_CHARACTERS
    for *_, text in read_documents(
        input_path(file), file.field, job.settings.reading, lambda *_: None
    ):
      yield text[:left]
      left -= len(text)
      if left <= 0:
        break


def prepare(job: Job, progress: Callable[[Input, int], None]) -> tuple[Manifest, int]:
  """Prepares a corpus, or the rest of it.

  Args:
    job: what to do.
    progress: called with a file and the bytes of its text that were newly done.

  Returns:
    The manifest, and the most memory that a process has had that encoded; 0 if none was needed.

  Raises:
    InputError: an input cannot be read, too many lines are bad, two values make one part's name, or
      the folder cannot be written.
  """
  files = job.files()
  with opened(job, files):
    done = _done(job, files)
    if (job.folder / MANIFEST).is_file() and len(done) == len(files):
      return read_manifest(job.folder), 0
    with _named_errors(job.folder):  # Some of it is done anew.
      (job.folder / MANIFEST).unlink(missing_ok=True)
    tokenizer = tokenizer_of(job, files)
    left = [file for file in files if file.number not in done]
    peak = 0
    if left:
      pool = EncoderPool(job.folder / TOKENIZER, job.workers)
      with contextlib.closing(pool):
        results = run_files(job, left, [*done.values()], pool, tokenizer, progress)
        done |= {file.number: result for file, result in zip(left, results, strict=True)}
        peak = pool.peak_memory()
    # Of files that were not read in one process.
    PartNames(result.values for result in done.values())
    bad = sum(result.source.bad for result in done.values())
    if bad > job.most_bad:
      raise InputError(f"{bad:,} lines are no documents. Expected other files, or a larger "
                       f"--most-bad than {job.most_bad:,}")
    return finish(job, tokenizer, [done[file.number] for file in files]), peak


def _done(job: Job, files: Sequence[Input]) -> dict[int, FileResult]:
  done: dict[int, FileResult] = {}
  for file in files:
    result = finished(job.folder, file, job.settings)
    if result is not None:
      done[file.number] = result
    elif job.settings.deduplicate:
      # What counts as new in a later file depends on this one.
      for later in files[file.number + 1 :]:
        result_file(job.folder, later.number).unlink(missing_ok=True)
      break
  return done


def run_files(
    job: Job, files: Sequence[Input], done: Sequence[FileResult],
    encoder: EncoderPool | InlineEncoder, tokenizer: Tokenizer,
    progress: Callable[[Input, int], None],
) -> Iterator[FileResult]:
  """Prepares files one after the other; yields the result of each.

  Args:
    job: the job.
    files: those to do.
    done: the results of the others, whose bad lines count and whose parts are named too.
    encoder: encodes documents.
    tokenizer: the encoder's.
    progress: see `prepare`.
  """
  bad = _BadLines(job.most_bad, sum(result.source.bad for result in done))
  dtype = token_dtype(tokenizer.vocab_size)
  names = PartNames(result.values for result in done)
  with contextlib.ExitStack() as stack:
    seen = None
    if job.settings.deduplicate:
      with _named_errors(job.folder):
        seen = stack.enter_context(contextlib.closing(Seen(job.folder)))
        for number in range(len(done)):
          if hashes_file(job.folder, number).is_file():
            seen.add_file(hashes_file(job.folder, number))
    groups = itertools.chain.from_iterable(
        read_groups(file, job.settings, seen, names, bad) for file in files
    )
    encoded = encoder.map(groups)
    for file in files:
      writer = FileWriter(job.folder, file, dtype)
      try:
        result = None
        while result is None:
          with _named_errors(job.folder):  # Reading keeps what was seen there.
            group, rows = next(encoded)
            writer.add(group, rows)
            result = writer.finish(group) if group.source else None
          progress(file, sum(group.sizes))
      finally:
        writer.abandon()  # Nothing is left of a finished one.
      yield result


class _BadLines:
  """Counts lines that are no documents, shows the first ones, and stops the job at too many."""

  def __init__(self, most: int, count: int) -> None:
    self._most, self._count = most, count

  def __call__(self, place: str, why: str) -> None:
    self._count += 1
    if self._count > self._most:
      raise InputError(
          f"more than {self._most:,} lines are no documents; the last of them is {place}: {why}. "
          "Expected other files, or a larger --most-bad"
      )
    if self._count <= _SHOWN_BAD:
      _LOG.warning("%s is passed over: %s", place, why)


def finish(job: Job, tokenizer: Tokenizer, results: Sequence[FileResult]) -> Manifest:
  """Writes the starts of documents of each stream, and the manifest.

  Raises:
    InputError: there is nothing to train on, or nothing is held out.
  """
  manifest = Manifest(
      tokenizer.fingerprint, tokenizer.vocab_size, dataclasses.asdict(job.settings),
      [result.source for result in results],
      [shard for result in results for shard in result.shards], {},
  )
  streams = manifest.streams
  if "heldout" not in streams and job.heldout:
    raise invalid("--heldout", job.heldout, "files with text")
  if "heldout" not in streams:
    raise invalid("--heldout-every", job.settings.heldout_every, "a smaller number, or held-out "
                  "files (--heldout): no document was held out")
  if len(streams) < 2:
    raise invalid("--input", job.inputs, "files with text to train on; all of it is held out")
  starts: dict[str, str] = {}
  with _named_errors(job.folder):
    shutil.rmtree(job.folder / STARTS, ignore_errors=True)
    with whole_folder(job.folder / STARTS) as partial:
      for name, shards in streams.items():
        indexes = (read_index(job.folder / SHARDS, shard) for shard in shards)
        starts |= _write_starts(partial, name, indexes)
    manifest = dataclasses.replace(manifest, starts=starts)
    manifest.write(job.folder)
  return manifest


def _write_starts(folder: Path, name: str, indexes: Iterator[np.ndarray]) -> dict[str, str]:
  """Writes the two files of a stream; returns their names and SHA-256."""
  files = [folder / (name + end) for end in STARTS_ENDS]
  hashes = [hashlib.sha256() for _ in files]
  start = 0
  with files[0].open("wb") as starts, files[1].open("wb") as sizes:
    for index in indexes:
      ends = start + np.cumsum(index[:, 0], dtype=INDEX_DTYPE)
      start = int(ends[-1])
      columns = (ends - index[:, 0], index[:, 1])
      for file, total, column in zip((starts, sizes), hashes, columns, strict=True):
        content = column.astype(INDEX_DTYPE).tobytes()
        file.write(content)
        total.update(content)
  for path in files:
    sync(path)
  return {path.name: total.hexdigest() for path, total in zip(files, hashes, strict=True)}
