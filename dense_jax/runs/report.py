"""Reports on a run at any time after its first checkpoint: a table, samples and a plot."""

import dataclasses
import logging
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from dense_jax.config import invalid
from dense_jax.data.pipeline import heldout_store, heldout_text, texts
from dense_jax.data.spelling import spell
from dense_jax.data.token_store import TokenStore
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.evaluation.baselines import byte_ngram_bits_per_byte, xz_bits_per_byte
from dense_jax.evaluation.perplexity import fixed
from dense_jax.files import make_path, write_atomically
from dense_jax.formatting import printable, table
from dense_jax.generation.generator import Generator
from dense_jax.generation.requests import Request
from dense_jax.generation.sampling import Sampling
from dense_jax.models.language_model import LanguageModel
from dense_jax.outputs import check_file
from dense_jax.runs import history
from dense_jax.runs.plot import plot_loss
from dense_jax.runs.recording import DEVICE_MEMORY, GOODPUT, HOST_MEMORY, MFU
from dense_jax.runs.report_page import write_page
from dense_jax.runs.restoring import Run, restore
from dense_jax.runs.scoring import Score, score_heldout
from dense_jax.runs.task_report import task_rows, task_samples
from dense_jax.runs.workdir import REPORT_FILE, holds_run
from dense_jax.training.events import read_events
from dense_jax.training.guard import SKIPPED
from dense_jax.training.loop import DATA_WAIT
from dense_jax.training.metrics import read_metrics

# The most bytes of training text, and of held-out text, that the baselines read.
_BASELINE_BYTES = 64 * 2**20
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
  """A run's scores, samples and plot at one of its checkpoints.

  Attributes:
    step: the checkpoint's step.
    score: the figures of the held-out text.
    table: bits per byte of the model and of baselines, or the share of right answers; speed and
      memory; in aligned columns.
    samples: pairs of a prompt, the beginning of a held-out document, and its continuation; or of a
      held-out row and its answers.
    plot, file, page: the paths of the plot, of the report's text, and of its HTML page.
  """

  step: int
  score: Score
  table: str
  samples: Sequence[tuple[str, str]]
  plot: epath.Path
  file: epath.Path
  page: epath.Path

  @property
  def text(self) -> str:
    """The table and the samples as printable text."""
    parts = [self.table]
    for prompt, continuation in self.samples:
      parts.append(f"--- prompt\n{prompt}\n--- continuation\n{continuation}")
    return "\n\n".join(parts)


def write_report(
    workdir: str | os.PathLike[str], checkpoint: str = "latest", weights: str = "auto", *,
    batches: int = 200, batch_size: int = 16, beside: Sequence[str | os.PathLike[str]] = (),
) -> Report:
  """Scores a run, samples from it and plots its losses, on one device.

  Writes loss.png, report.md and report.html into the run's folder. The run may be training at the
  same time, on any number of devices.

  Args:
    workdir: the folder that training wrote.
    checkpoint: "latest", "best" (by held-out loss) or a step's number.
    weights: "raw", "ema" or "auto"; see `restore`.
    batches: the most batches of held-out text to score, spread evenly over it; 0 means all.
    batch_size: windows in a batch, of `config.data.seq_len` tokens each.
    beside: the folders of other runs, which the page compares with.

  Raises:
    InputError: there is no such run or checkpoint, its text is no longer where it was, or the
      folder cannot be written.
  """
  folder = make_path(os.fspath(workdir), "--workdir")
  others = [make_path(os.fspath(each), "--beside") for each in beside]
  for other in others:
    if not holds_run(other):
      raise invalid("--beside", os.fspath(other), "a folder with a run")
  run = restore(folder, checkpoint, weights)
  config = run.config
  check_file(os.fspath(folder / REPORT_FILE), "--workdir")
  score = score_heldout(run, batch_size=batch_size, batches=batches)
  rows, continued = _figures(run, score, read_metrics(folder))
  report = Report(
      run.step, score, table(rows), continued, plot_loss(folder), folder / REPORT_FILE,
      write_page(folder, rows, continued, others),
  )
  # An indented code block, because nothing in a sample can end it.
  indented = "".join(f"    {line}\n" for line in report.text.splitlines())
  title = f"# Step {run.step} of {config.train.steps}"
  content = f"{title}\n\n{indented}\n![training and held-out loss]({report.plot.name})\n"
  events = read_events(folder)
  if events:
    lines = "".join(f"    {'  '.join(row).strip()}\n" for row in history.rows(events)[1:])
    content += f"\n## What happened\n\n{history.summary(events)}\n\n{lines}"
  write_atomically(report.file, content.encode(errors="replace"))
  if not math.isfinite(score.held_out.loss):
    _LOG.warning("the loss is not finite: lower the learning rate")
  return report


def _figures(
    run: Run, score: Score, metrics: Sequence[Mapping[str, float]]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
  """Returns the rows of the table, and the samples."""
  config, data = run.config, run.config.data
  name = f"this model ({config.model.family}, dense depth {config.model.dense.depth})"
  if data.task.exists:
    rows = task_rows(score, data.task.name, name)
    continued = task_samples(run, heldout_store(data, run.tokenizer))
  else:
    train, heldout = texts(data, run.tokenizer)
    rows = comparison(score, _beginning(train), _beginning(heldout), name)
    store = heldout_text(data, run.tokenizer)
    continued = samples(run.model, store, run.tokenizer, seed=config.seed)
  return [*rows, *resources(score, metrics), *reliability(metrics)], continued


def _beginning(documents: Iterable[str]) -> bytes:
  """Returns texts as UTF-8, up to the baselines' limit."""
  parts, size = [], 0
  for document in documents:
    parts.append(document.encode())
    size += len(parts[-1])
    if size >= _BASELINE_BYTES:
      break
  return b"".join(parts)[:_BASELINE_BYTES]


def comparison(
    score: Score, train: bytes, heldout: bytes, name: str
) -> list[tuple[str, str]]:
  """Returns the first rows of the table of a text: bits per byte beside the baselines'.

  Args:
    score: the model's figures of the held-out text.
    train: the text that the n-grams are counted in.
    heldout: the text that the baselines are scored on.
    name: the model's name in the table.
  """
  assert score.bits_per_byte is not None
  return [
      ("held-out text", "bits per byte"),
      ("byte bigram", f"{byte_ngram_bits_per_byte(train, heldout, 2):.3f}"),
      ("byte trigram", f"{byte_ngram_bits_per_byte(train, heldout, 3):.3f}"),
      ("xz -9", f"{xz_bits_per_byte(heldout):.3f}"),
      (name, fixed(score.bits_per_byte, 3)),
      ("", ""),
      ("perplexity per token", fixed(score.held_out.perplexity, 2)),
  ]


def resources(
    score: Score, metrics: Sequence[Mapping[str, float]]
) -> list[tuple[str, str]]:
  """Returns the last rows of the table: how much was scored, speed and memory.

  Args:
    score: the model's figures.
    metrics: the run's records, from `read_metrics`.
  """
  rows = []
  held_out = score.held_out
  if held_out.context:
    rows.append(("context", held_out.context))
  if score.scored < score.windows:
    rows.append(("windows scored", f"{score.scored:,} of {score.windows:,}"))
  speeds = [record["tokens_per_second"] for record in metrics if "tokens_per_second" in record]
  if speeds:
    rows.append(("training tokens/s (median)", f"{statistics.median_high(speeds):,.0f}"))
  for key, what in ((HOST_MEMORY, "peak memory (RSS)"), (DEVICE_MEMORY, "peak device memory")):
    sizes = [record[key] for record in metrics if key in record]
    if sizes:
      rows.append((what, f"{max(sizes) / 2**20:,.0f} MiB"))
  return rows


def reliability(metrics: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
  """Returns rows of the table about what was skipped and lost, of a run that recorded it.

  Args:
    metrics: the run's records, from `read_metrics`.
  """
  newest: dict[str, float] = {}
  for record in metrics:
    newest |= record
  shown = [
      (SKIPPED, "skipped steps", ",.0f"), (MFU, "model FLOPs utilization", ".1%"),
      (DATA_WAIT, "waiting for data", ".1%"), (GOODPUT, "goodput", ".1%"),
  ]
  return [(what, f"{newest[name]:{form}}") for name, what, form in shown if name in newest]


def samples(
    model: LanguageModel, store: TokenStore, tokenizer: Tokenizer, *, seed: int
) -> list[tuple[str, str]]:
  """Continues two prompts: the beginnings of held-out documents, or prompts of held-out examples.

  Returns:
    Pairs of a prompt and its continuation, printable. Joined, they are the text that the tokenizer
    spells for the tokens of both.
  """
  texts = []
  for document in (0, store.num_documents // 2):
    texts.append(store.prompt(document, 23))
  sampling = Sampling(temperature=0.8, top_p=0.95)
  requests = [
      Request([tokenizer.bos_id, *ids], sampling, 64, seed, stop_ids=(tokenizer.eos_id,))
      for ids in texts
  ]
  pairs = []
  for ids, result in zip(texts, Generator(model, batch_size=2)(requests), strict=True):
    prompt, new = spell(tokenizer, ids, result.ids)
    text = printable(prompt + new)  # Joined first: CR LF may lie across both.
    pairs.append((text[: len(prompt)], text[len(prompt) :]))
  return pairs
