"""Code shared by the benchmarks: timed steps, the machine, the record of a run, tables.

Benchmarks run as modules from the repository's root (`python -m experiments.benchmarks.cpu`),
so that commands and tests import them by the same name.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import tqdm
from etils import epath

from dense_jax import experiment, outputs, sharding
from dense_jax.batch import Batch, Segments
from dense_jax.config import ExperimentConfig
from dense_jax.errors import InputError
from dense_jax.formatting import markdown_table
from dense_jax.generation.programs import BLOCK, Programs
from dense_jax.generation.requests import Request
from dense_jax.generation.sampling import Sampling
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import count_params, with_params
from dense_jax.models.registry import FAMILIES
from dense_jax.training.step import Trainer

CaseT = TypeVar("CaseT")

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The families that have states, which deeper layers can read.
SSM_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.form != "attention")


@dataclasses.dataclass(frozen=True)
class Size:
  """The size of a model and its batch."""

  width: int
  layers: int
  vocabulary: int
  batch_size: int
  time_steps: int

  def __str__(self) -> str:
    return (f"D {self.width}, {self.layers} layers, V {self.vocabulary}, "
            f"{self.batch_size} x {self.time_steps} tokens")


def config(
    family: str,
    size: Size,
    *,
    dense: Mapping[str, object] | None = None,
    mixer: Mapping[str, object] | None = None,
    **model: object,
) -> ExperimentConfig:
  """Makes the configuration of a family's model; options that are not given have their defaults.

  Args:
    family: a key of FAMILIES.
    size: the size of the model and the batch.
    dense: keys of config.model.dense.
    mixer: keys of config.model.mixer.
    **model: keys of config.model.

  Raises:
    InputError: the family does not have these dense connections.
  """
  values = experiment.default_config(family)
  values.model.update(vocab_size=size.vocabulary, width=size.width, layers=size.layers, **model)
  values.model.mixer.update(mixer or {})
  values.model.dense.update(dense or {})
  values.data.seq_len = size.time_steps
  values.train.update(batch_size=size.batch_size, steps=100)
  return experiment.resolve(values)


def batch(settings: ExperimentConfig, documents: int) -> Batch:
  """Makes a batch of random tokens on the host, each row with `documents` of equal length."""
  rows, length = settings.train.batch_size, settings.data.seq_len
  shape = (rows, length + 1)
  # Any: the dataclasses' fields are annotated as jax arrays, and these are numpy arrays.
  tokens: Any = np.random.default_rng(0).integers(0, settings.model.vocab_size, shape, np.int32)
  each = -(-length // documents)
  number, position = np.divmod(np.arange(length, dtype=np.int32), np.int32(each))
  ids: Any = np.ascontiguousarray(np.broadcast_to(1 + number, (rows, length)))
  positions: Any = np.ascontiguousarray(np.broadcast_to(position, (rows, length)))
  mask: Any = np.ones((rows, length), bool)
  return Batch(tokens[:, :-1], tokens[:, 1:], mask, Segments(positions, ids))


def make_trainer(settings: ExperimentConfig) -> Trainer:
  """Makes the trainer of a configuration on one device."""
  return Trainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))


class TrainStep:
  """A compiled train step with its state: forward, backward and AdamW, on one device.

  Attributes:
    parameters: the number of the model's parameters.
    tokens: the number of tokens per step.
    batch: the rows that it trains on, on the host.
  """

  def __init__(self, settings: ExperimentConfig, *, documents: int = 1) -> None:
    """Compiles the step and runs it once."""
    trainer = make_trainer(settings)
    self.batch = batch(settings, documents)
    self._batch = trainer.put(self.batch)
    self._state = trainer.init(0)
    self._model = trainer.model
    self._train_step = trainer.train_step
    self.parameters = count_params(self._state.params)
    self.tokens = settings.train.batch_size * settings.data.seq_len
    self()

  def model(self) -> LanguageModel:
    """Returns the model as it is now; it must not be used after the next step."""
    return with_params(self._model, self._state.params)

  def __call__(self) -> float:
    """Runs one step; returns its seconds."""
    start = time.perf_counter()
    self._state, metrics = self._train_step(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - start


class Decoding:
  """Greedy decoding of a batch of prompts, in blocks of tokens.

  Attributes:
    parameters: the number of the model's parameters.
    batch_size: B, the number of prompts.
    model: the model.
    prompt: the ids of each prompt.
  """

  def __init__(self, settings: ExperimentConfig, batch_size: int, *, context: int = 3) -> None:
    """Compiles, reads prompts of `context` tokens, and decodes two blocks."""
    trainer = make_trainer(settings)
    params = trainer.init(0).params
    self.parameters = count_params(params)
    self.batch_size = batch_size
    self.model = with_params(trainer.model, params)
    self._programs = Programs(self.model, batch_size)
    prompt = np.random.default_rng(0).integers(0, settings.model.vocab_size, context).tolist()
    self.prompt = prompt
    request = Request(prompt, Sampling(temperature=0), max_new_tokens=2**31 - 1)
    read, self._rows = self._programs.read(prompt), self._programs.empty()
    for row in range(batch_size):
      self._rows = self._programs.insert(self._rows, row, read, request)
    self(), self()

  def __call__(self) -> float:
    """Decodes one block; returns the seconds per token (of all rows together)."""
    start = time.perf_counter()
    self._rows, _, _ = self._programs.decode(self._rows)
    return (time.perf_counter() - start) / BLOCK


@dataclasses.dataclass(frozen=True)
class Compared:
  """The times of two calls that alternated.

  Attributes:
    first, second: the median seconds of each.
    ratio: the median of second / first over all repetitions.
    low, high: the smallest and the largest of these ratios.
    quartiles: the first and the third quartile of these ratios.
  """

  first: float
  second: float
  ratio: float
  low: float
  high: float
  quartiles: tuple[float, float]

  def middle(self) -> str:
    """Returns the quartiles of the ratios, for a table."""
    return f"{self.quartiles[0]:.2f} to {self.quartiles[1]:.2f}"

  def range(self) -> str:
    """Returns the range of the ratios, for a table."""
    return f"{self.low:.2f} to {self.high:.2f}"


def compare(
    first: Callable[[], float],
    second: Callable[[], float],
    repeats: int,
    done: Callable[[], object] = lambda: None,
) -> Compared:
  """Times two calls in turn, so that disturbances of the machine affect both alike.

  Each is called once before, to warm up.

  Args:
    first: a call that returns its seconds.
    second: the other call.
    repeats: the number of pairs.
    done: called after each pair.
  """
  first(), second()
  pairs = []
  for _ in range(repeats):
    pairs.append((first(), second()))
    done()
  ratios = [after / before for before, after in pairs]
  lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else (
      ratios * 3
  )
  return Compared(
      statistics.median(before for before, _ in pairs),
      statistics.median(after for _, after in pairs),
      statistics.median(ratios), min(ratios), max(ratios), (lower, upper),
  )


def timed(call: Callable[[], object]) -> Callable[[], float]:
  """Wraps a jax computation as a call that waits for its result and returns its seconds."""
  def run() -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start

  return run


def median(call: Callable[[], float], repeats: int) -> float:
  """Returns the median of a call's seconds; the caller has warmed it up."""
  return statistics.median(call() for _ in range(repeats))


def resident_memory() -> int:
  """Returns the resident memory of this process, in bytes."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def hardware() -> str:
  """Describes the cores and memory of this process, and the GPUs with their memory and driver."""
  model = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.is_file():
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")]
    model = names[0] if names else model
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  parts = [f"{len(os.sched_getaffinity(0))} cores of {model}, {memory:.0f} GiB"]
  # nvidia-smi, because asking jax would allocate the GPU to this process.
  if shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    parts += [f"{line}" for line in found.stdout.splitlines() if line and not found.returncode]
  return "; ".join(parts)


def versions(*names: str) -> dict[str, str]:
  """Returns the versions of Python and of those of the libraries that are installed."""
  found = {"python": platform.python_version()}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def record(
    module: str, arguments: Sequence[str], note: str, results: Any, **more: Any
) -> dict[str, Any]:
  """Returns the figures together with date, hardware, versions and command, as JSON values.

  Args:
    module: the benchmark, such as "cpu".
    arguments: its command-line arguments.
    note: an explanation of the figures, such as their units.
    results: the figures.
    **more: further fields.
  """
  tunables = os.environ.get("GLIBC_TUNABLES")
  command = [f"GLIBC_TUNABLES={tunables}"] if tunables else []
  command += ["python", "-m", f"experiments.benchmarks.{module}", *arguments]
  return {
      "date": datetime.date.today().isoformat(),
      "hardware": hardware(),
      "versions": versions("jax", "jaxlib", "flax", "optax", "numpy"),
      "command": " ".join(command),
      **more,
      "note": note,
      "results": results,
  }


def write_json(path: str, content: Any) -> None:
  """Writes `content` as JSON, atomically."""
  outputs.write_json(epath.Path(path), content, "--json")


def _writable(path: str) -> str:
  """Checks the argument of --json before a benchmark runs for hours; "" means no file."""
  try:
    return str(outputs.check_file(path, "--json")) if path else ""
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def parser(description: str | None, quick: str = "") -> argparse.ArgumentParser:
  """Makes a benchmark's argument parser, with --json.

  Args:
    description: a docstring, of which the first line is used.
    quick: a description of what --quick runs; "" means no --quick.
  """
  command = argparse.ArgumentParser(description=(description or "").splitlines()[0])
  if quick:
    command.add_argument("--quick", action="store_true", help=f"{quick}: a smoke test")
  command.add_argument(
      "--json", type=_writable, default="", metavar="FILE", help="write the figures there"
  )
  return command


def quiet() -> bool:
  """Returns whether standard error is not a terminal: progress bars would only fill a log."""
  return not sys.stderr.isatty()


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of a benchmark's output.

  Attributes:
    title: its title.
    rows: the header, then one row for each case.
    results: case -> its figures, for the record.
  """

  title: str
  rows: Sequence[Sequence[str]]
  results: dict[str, dict[str, float]]

  def __str__(self) -> str:
    return f"{self.title}\n\n{markdown_table(self.rows)}\n"


def progress(cases: Sequence[CaseT], name: str) -> Iterator[CaseT]:
  """Yields the cases, with a progress bar on a terminal."""
  yield from tqdm.tqdm(cases, desc=name, disable=quiet(), dynamic_ncols=True, leave=False)


def number(value: float | None) -> str:
  """Formats a rate for a table; "" if it is None."""
  return "" if value is None else f"{value:.0f}"


def ratio(value: float | None) -> str:
  """Formats a ratio for a table; "" if it is None."""
  return "" if value is None else f"{value:.2f}"


def bar(least: float | None) -> str:
  """Formats the least value that a ratio must reach; "" if it is None."""
  return "" if least is None else f">= {least:g}"


def figures(**values: float | None) -> dict[str, float]:
  """Returns the given figures; None means that one was not measured, and leaves it out."""
  return {name: value for name, value in values.items() if value is not None}
