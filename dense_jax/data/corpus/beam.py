"""The files of a corpus, prepared by an Apache Beam pipeline: past one machine.

Each file is a task of its own, of the same function that prepares it on one machine
(`job.run_files`), and leaves the same shards and the same result behind. `job.prepare` then finds
all files done, and writes the manifest.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from dense_jax.config import invalid
from dense_jax.data.corpus.encoding import DocumentEncoder
from dense_jax.data.corpus.files import RESULTS, Input, finished
from dense_jax.data.corpus.job import Job, opened, run_files, tokenizer_of
from dense_jax.data.corpus.manifest import SHARDS
from dense_jax.data.corpus.workers import InlineEncoder
from dense_jax.data.tokenizer import load_saved_tokenizer
from dense_jax.data.tokenizer_files import write_files
from dense_jax.errors import InputError
from dense_jax.files import temporary_beside


def run_pipeline(job: Job, flags: Sequence[str]) -> None:
  """Prepares all files of a job that are not done, by a Beam pipeline.

  Args:
    job: the job. Its inputs and its folder must be where all of Beam's workers see them.
    flags: Beam's own, such as --runner=DataflowRunner.

  Raises:
    InputError: apache_beam is not installed, or the job de-duplicates, which needs to see files in
      their order.
  """
  try:
    import apache_beam as beam  # An optional dependency.
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise InputError("--beam needs the package apache_beam: pip install -e '.[beam]'") from error
  if job.settings.deduplicate:
    raise invalid("--deduplicate", True, "nothing with --beam: files are prepared in no order")
  files = job.files()
  with opened(job, files):
    tokenizer = tokenizer_of(job, files)
    left = [file for file in files if finished(job.folder, file, job.settings) is None]
    task = _Task(job, tokenizer.files())

    class PrepareFile(beam.DoFn):
      """Prepares one file."""

      def process(self, file: Input) -> Iterator[int]:
        yield task.prepare(file)

    with beam.Pipeline(options=PipelineOptions([*flags])) as pipeline:
      _ = (
          pipeline | "files" >> beam.Create(left) | "spread" >> beam.Reshuffle()
          | "prepare" >> beam.ParDo(PrepareFile())
      )


@dataclasses.dataclass(frozen=True)
class _Task:
  """A job as it goes to a worker, which may prepare any file.

  Attributes:
    job: the job.
    tokenizer: the tokenizer's files, by name.
  """

  job: Job
  tokenizer: dict[str, bytes]

  def prepare(self, file: Input) -> int:
    """Prepares a file, whole or not at all; returns the bytes of its text."""
    with tempfile.TemporaryDirectory() as place:
      folder = Path(place)
      write_files(epath.Path(folder / "tokenizer"), self.tokenizer)
      tokenizer = load_saved_tokenizer(folder / "tokenizer")
      for name in (SHARDS, RESULTS):
        (folder / name).mkdir()
      encoder = InlineEncoder(DocumentEncoder(tokenizer))
      job = dataclasses.replace(self.job, folder=folder)
      (result,) = run_files(job, [file], [], encoder, tokenizer, lambda *_: None)
      for name in (SHARDS, RESULTS):  # The result comes last: it says that the shards are there.
        for made in sorted((folder / name).iterdir()):
          _move(made, self.job.folder / name / made.name)
    return sum(shard.text_bytes for shard in result.shards)


def _move(made: Path, target: Any) -> None:
  """Copies a file beside its target, then renames it, so that it is there as a whole."""
  # Of a name of its own: a worker that was given up may still be writing.
  partial = temporary_beside(target)
  epath.Path(made).copy(partial, overwrite=True)
  partial.replace(target)
