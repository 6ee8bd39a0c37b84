"""The page of a run's report, also beside other runs: curves, figures, differences, samples."""

import dataclasses
import io
import itertools
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from dense_jax import experiment
from dense_jax.config import ExperimentConfig
from dense_jax.files import endings, write_atomically
from dense_jax.models.params import abstract_model, count_params, get_params
from dense_jax.runs import history, resume
from dense_jax.runs.page import Page
from dense_jax.runs.plot import draw_losses
from dense_jax.runs.recording import DEVICE_MEMORY, HOST_MEMORY
from dense_jax.runs.workdir import PAGE_FILE
from dense_jax.training.events import read_events
from dense_jax.training.metrics import read_metrics

ANALYSIS_PLOT = "analysis.png"


@dataclasses.dataclass(frozen=True)
class _Shown:
  """A run on the page: its name, configuration and records."""

  name: str
  config: ExperimentConfig
  records: list[dict[str, float]]

  def newest(self, key: str) -> float | None:
    return next((record[key] for record in reversed(self.records) if key in record), None)

  def median(self, key: str) -> float | None:
    values = [record[key] for record in self.records if key in record]
    return statistics.median_high(values) if values else None


def write_page(
    workdir: epath.Path, rows: Sequence[Sequence[str]], samples: Sequence[tuple[str, str]],
    beside: Sequence[epath.Path] = (),
) -> epath.Path:
  """Writes report.html into a run's folder, and returns its path.

  Args:
    workdir: the run's folder.
    rows: the report's table, its header first; an empty row ends what the header is about.
    samples: pairs of a prompt and its continuation.
    beside: the folders of other runs, to compare with.

  Raises:
    InputError: a folder holds no run.
  """
  folders = [workdir, *beside]
  shown = [_Shown(name, experiment.read(folder), read_metrics(folder))
           for name, folder in zip(endings(folders), folders, strict=True)]
  first = shown[0]
  dense = first.config.model.dense
  page = Page(
      f"Report on {first.name}",
      f"{first.config.model.family}, dense depth {dense.depth}"
      + (f" ({dense.inject}, {dense.reads})" if dense.depth else "")
      + f"; {first.config.train.steps:,} steps",
  )
  page.section("Results")
  page.table(_figures(shown))
  page.text("Losses and bits per byte are those that training recorded last.")
  groups = [list(group) for some, group in itertools.groupby(rows, any) if some]
  for number, group in enumerate(groups):
    page.table([("further figures", "value"), *group] if number else group)
  page.section("Curves")
  page.picture(_losses(shown), "training and held-out loss by step")
  page.picture(_speeds(shown), "tokens per second by step")
  events = read_events(workdir)
  if events:
    page.section("What happened")
    page.text(history.summary(events))
    page.table(history.rows(events))
  if len(shown) > 1:
    page.section("Differences")
    page.table(_differences(shown))
  page.section("Samples")
  for prompt, continuation in samples:
    page.preformatted(continuation, prompt)
  page.text("Prompts are gray.")
  for each, folder in zip(shown, folders, strict=True):
    if (folder / ANALYSIS_PLOT).is_file():
      page.section(f"Layers of {each.name}")
      page.picture((folder / ANALYSIS_PLOT).read_bytes(), f"figures of the layers of {each.name}")
  page.section("Configuration")
  page.table([("key", "value"), *((key, str(value)) for key, value in
                                  resume.keys(first.config).items())])
  page.text(
      f"Made on {_hardware()}, Python {platform.python_version()}, jax {jax.__version__}. Speeds "
      "and memory are those of training."
  )
  file = workdir / PAGE_FILE
  write_atomically(file, page.html().encode(errors="replace"))
  return file


def _hardware() -> str:
  """Names the device and the processor of this machine."""
  return f"{jax.devices()[0].device_kind}, {platform.machine()} with {os.cpu_count()} cores"


def _figures(shown: Sequence[_Shown]) -> list[tuple[str, ...]]:
  """Returns the rows of the table of all runs, the header first, without empty columns."""
  rows: list[tuple[str, ...]] = [(
      "run", "parameters", "step", "training loss", "held-out loss", "bits per byte",
      "answers right", "tokens/s", "peak memory, MiB",
  )]
  for each in shown:
    parameters = count_params(get_params(abstract_model(each.config.model)))
    memory = each.newest(DEVICE_MEMORY) or each.newest(HOST_MEMORY)
    rows.append((
        each.name, f"{parameters:,}", _text(each.newest("step"), ",.0f"),
        _text(each.newest("loss"), ".4f"), _text(each.newest("heldout_loss"), ".4f"),
        _text(each.newest("heldout_bits_per_byte"), ".3f"),
        _text(each.newest("task_accuracy"), ".4f"),
        _text(each.median("tokens_per_second"), ",.0f"),
        _text(memory and memory / 2**20, ",.0f"),
    ))
  filled = [any(column) for _, *column in zip(*rows, strict=True)]
  return [tuple(itertools.compress(row, filled)) for row in rows]


def _text(value: float | None, form: str) -> str:
  return "" if value is None else f"{value:{form}}"


def _differences(shown: Sequence[_Shown]) -> list[tuple[str, ...]]:
  """Returns the configuration's keys that differ between runs, with each run's value."""
  keys = [resume.keys(each.config) for each in shown]
  names = sorted(set().union(*keys))
  rows = [(name, *(str(values.get(name, "")) for values in keys)) for name in names]
  differing = [row for row in rows if len(set(row[1:])) > 1]
  return [("key", *(each.name for each in shown)), *differing]


def _losses(shown: Sequence[_Shown]) -> bytes:
  """Draws the losses of all runs."""
  figure, axes = _figure()
  draw_losses(axes, {each.name if len(shown) > 1 else "": each.records for each in shown})
  return _png(figure)


def _speeds(shown: Sequence[_Shown]) -> bytes:
  """Draws the speeds of all runs."""
  figure, axes = _figure()
  for each in shown:
    points = [(r["step"], r["tokens_per_second"]) for r in each.records if "tokens_per_second" in r]
    axes.plot([step for step, _ in points], [speed for _, speed in points], label=each.name)
  axes.set_xlabel("step")
  axes.set_ylabel("tokens per second")
  axes.yaxis.set_major_formatter("{x:,.0f}")
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)
  if len(shown) > 1:
    axes.legend()
  return _png(figure)


def _figure() -> tuple[Any, Any]:
  """Returns a figure of which two stand side by side on a wide page, and its axes."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(5.5, 4), layout="constrained")
  axes = figure.subplots()
  axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
  return figure, axes


def _png(figure: Any) -> bytes:
  image = io.BytesIO()
  figure.savefig(image, dpi=110)
  return image.getvalue()
