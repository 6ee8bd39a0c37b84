"""Budgets: cells whose parameters, FLOPs or time agree with those of another cell."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from etils import epath

from dense_jax import experiment
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.data.cache import digest
from dense_jax.errors import InputError
from dense_jax.files import locked, parse_json
from dense_jax.models.flops import train_flops
from dense_jax.models.params import abstract_model, count_params, get_params
from dense_jax.outputs import check_folder, write_json
from dense_jax.runs import resume
from dense_jax.runs.compile import with_vocab
from dense_jax.sweeps.definition import Cell, Sweep
from dense_jax.sweeps.timing import device_kind, time_ratio

TIMES_FILE = "times.json"
_OF_TIME = re.compile(
    r"(model|mesh)\..*|data\.seq_len|train\.(batch_size|accumulate|loss_chunk|ema|z_loss)|"
    r"optimizer\..*_dtype|guard\.skip"
)
_WIDTH_STEP = 8

Measure = Callable[[ExperimentConfig, ExperimentConfig], float]


@dataclasses.dataclass(frozen=True)
class PlannedCell:
  """A cell with its budget.

  Attributes:
    cell: the cell.
    overrides: dotted key -> text, those that its budget needs included; without the seed.
    config: the experiment with them, and with the size of the vocabulary.
  """

  cell: Cell
  overrides: dict[str, str]
  config: ExperimentConfig

  @functools.cached_property  # The model is traced for it, and tables and plans read it often.
  def parameters(self) -> int:
    """The number of the model's parameters."""
    return count_params(get_params(abstract_model(self.config.model)))

  @property
  def tokens(self) -> int:
    """The tokens that a run trains on, padding included."""
    train = self.config.train
    return train.steps * train.batch_size * self.config.data.seq_len

  @functools.cached_property
  def token_flops(self) -> int:
    """The model FLOPs of training on one token."""
    return train_flops(self.config.model, self.config.data.seq_len)

  @property
  def scored_rows(self) -> int:
    """The held-out rows that the loss is of, at most; 0 means all."""
    return scored_rows(self.config)

  @property
  def flops(self) -> int:
    """The model FLOPs of a run's training; see `dense_jax.models.flops`."""
    return self.tokens * self.token_flops

  @property
  def course(self) -> dict[str, object]:
    """All values that determine what a run computes; see `resume.course`."""
    return resume.course(self.config)


def scored_rows(config: ExperimentConfig) -> int:
  """Returns the held-out rows that a run's loss is of, at most; 0 means all."""
  return config.train.eval_batches * config.train.batch_size


def course_digest(planned: PlannedCell) -> str:
  """Returns the digest of a cell's settings that its results carry."""
  return digest(json.dumps(planned.course, sort_keys=True))


def plan(
    sweep: Sweep, folder: epath.Path, measure: Measure = time_ratio,
    device: Callable[[], str] = device_kind,
) -> list[PlannedCell]:
  """Gives each cell its budget.

  Args:
    sweep: the sweep.
    folder: where measured ratios of times are kept, so that a sweep that goes on has the budgets
      that it began with. A ratio holds for two cells of these settings and this kind of device.
    measure: (one, other) -> the time of a step of the one over the other's.
    device: returns the kind of device that `measure` measures on.

  Raises:
    InputError: a cell's configuration is not valid, no width has the wanted parameters, or cells
      would be scored on different rows.
  """
  found: dict[str, PlannedCell] = {}
  for cell in sorted(sweep.cells, key=lambda cell: cell.match is not None):
    planned = _planned(sweep, cell, {})
    if cell.match:
      other = found[cell.match.cell]
      if cell.match.by == "parameters":
        change = {"model.width": _width(sweep, cell, other.parameters)}
      else:
        if cell.match.by == "flops":
          ratio = planned.token_flops / other.token_flops
        else:
          ratio = _measured(folder, planned, other, measure, device())
        change = {"train.steps": _steps(planned.config, other.config, ratio)}
      planned = _planned(sweep, cell, change)
    found[cell.name] = planned
  _check_scored(found.values())
  return [found[cell.name] for cell in sweep.cells]


def _check_scored(cells: Iterable[PlannedCell]) -> None:
  """Checks that all cells are scored on as many held-out rows, which are then the same."""
  first, *others = cells
  for other in others:
    if other.scored_rows != first.scored_rows:
      raise invalid(
          f"cell {other.cell.name!r}: train.eval_batches", other.config.train.eval_batches,
          f"batches of as many rows as those of cell {first.cell.name!r}, "
          f"{first.scored_rows or 'all'}",
      )


def _planned(sweep: Sweep, cell: Cell, change: Mapping[str, int]) -> PlannedCell:
  overrides = dict(cell.texts()) | {key: str(value) for key, value in change.items()}
  try:
    config = with_vocab(experiment.load(sweep.experiment, list(overrides.items())))
  except InputError as error:
    raise InputError(f"cell {cell.name!r}: {error}") from error
  return PlannedCell(cell, overrides, config)


def _steps(config: ExperimentConfig, other: ExperimentConfig, ratio: float) -> int:
  """Returns the steps that cost as much as all of the other's, if a token costs `ratio` of it."""
  tokens = config.train.batch_size * config.data.seq_len
  others = other.train.steps * other.train.batch_size * other.data.seq_len
  return max(round(others / tokens / ratio), 1)


def _width(sweep: Sweep, cell: Cell, parameters: int) -> int:
  """Returns the width, a multiple of 8, with the number of parameters nearest to the wanted one."""

  def count(width: int) -> int | None:
    try:
      return _planned(sweep, cell, {"model.width": width}).parameters
    except InputError:  # Heads that the width does not divide, for example.
      return None

  best: tuple[int, int] | None = None
  limit = 8 * _planned(sweep, cell, {}).config.model.width
  for width in range(_WIDTH_STEP, limit, _WIDTH_STEP):
    found = count(width)
    if found is None:
      continue
    if best is None or abs(found - parameters) < best[0]:
      best = abs(found - parameters), width
    if found > parameters:
      break
  if best is None:
    raise invalid(f"cell {cell.name!r}: match", "parameters", "a family with a valid width")
  return best[1]


def _measured(
    folder: epath.Path, planned: PlannedCell, other: PlannedCell,
    measure: Measure, device: str,
) -> float:
  """Returns the ratio of the times of a token, which is measured once in a sweep's folder."""
  file = check_folder(os.fspath(folder), "--workdir") / TIMES_FILE
  folder.mkdir(parents=True, exist_ok=True)
  one, two = (f"{each.cell.name} ({_time_digest(each.config)})" for each in (planned, other))
  key = f"{one} / {two} on {device}"
  with locked(file):  # Another process may plan the same sweep.
    try:
      times = parse_json(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
      raise InputError(f"{file} is damaged ({error}): expected what this sweep wrote") from error
    if key not in times:
      tokens = planned.config.train.batch_size * planned.config.data.seq_len
      others = other.config.train.batch_size * other.config.data.seq_len
      times[key] = measure(planned.config, other.config) * others / tokens
      write_json(file, times, "--workdir")
  return float(times[key])


def _time_digest(config: ExperimentConfig) -> str:
  """Returns the digest of the settings on which the time of a train step depends."""
  values = {key: value for key, value in resume.keys(config).items() if _OF_TIME.fullmatch(key)}
  return digest(json.dumps(values, sort_keys=True))


def describe_plan(cells: Sequence[PlannedCell]) -> list[tuple[str, ...]]:
  """Returns the rows of a table of the cells: parameters, tokens, FLOPs, and what is matched."""
  rows: list[tuple[str, ...]] = [("cell", "parameters", "tokens", "TFLOP", "equal")]
  for each in cells:
    rows.append((each.cell.name, f"{each.parameters:,}", f"{each.tokens:,}",
                 f"{each.flops / 1e12:,.0f}", each.cell.equal))
  return rows
