"""A sweep's results as a table in Markdown, and as a picture."""

import io
import math
import statistics
from collections.abc import Iterable

from etils import epath

from dense_jax.files import write_atomically
from dense_jax.formatting import markdown_table
from dense_jax.runs.page import Page
from dense_jax.statistics import Estimate
from dense_jax.sweeps.budgets import PlannedCell
from dense_jax.sweeps.definition import Cell, Sweep
from dense_jax.sweeps.differences import difference
from dense_jax.sweeps.results import Results

_HEADER = ("cell", "parameters", "tokens", "TFLOP", "tokens/s", "time, s", "by FLOPs, s", "seeds",
           "{metric}", "less base", "p", "verdict", "base", "equal")
_TEXTS = 3  # The last columns are words.


def rows(sweep: Sweep, planned: list[PlannedCell], results: Results) -> list[tuple[str, ...]]:
  """Returns the table's rows, the header first; cells without results have dashes."""
  table = [tuple(name.format(metric=sweep.metric) for name in _HEADER)]
  of_name = {each.cell.name: each for each in planned}
  for each in planned:
    cell, base = each.cell, sweep.base_of(each.cell)
    found = results.of(cell.name)
    speed, time, base_time = _speed(results, cell), _time(results, each), _time(
        results, of_name[base.name])
    mean = Estimate.of(list(results.values(cell.name).values()))
    less = difference(sweep, results, cell)
    compared = (_number(less, "+.4f"), _p_value(less), _verdict(sweep, less), base.name)
    table.append((
        cell.name, f"{each.parameters:,}", f"{each.tokens:,}", _digits(each.flops / 1e12),
        _digits(speed), _digits(time), _digits(base_time * each.flops / of_name[base.name].flops),
        str(len(found)), _number(mean, ".4f"), *(compared if cell is not base else [""] * 4),
        cell.equal,
    ))
  return table


def _speed(results: Results, cell: Cell) -> float:
  """Returns the median tokens per second of a cell's runs; NaN before the first has finished."""
  speeds = [result.tokens_per_second for result in results.of(cell.name).values()]
  return statistics.median(speeds) if speeds else math.nan


def _time(results: Results, planned: PlannedCell) -> float:
  """Returns the seconds that a cell's run trains at its median speed."""
  return planned.tokens / _speed(results, planned.cell)


def _digits(value: float) -> str:
  """Formats a positive number with three digits, or with all before the decimal point."""
  if math.isnan(value):
    return "-"
  return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _number(estimate: Estimate, form: str) -> str:
  if not estimate.count:
    return "-"
  error = "" if math.isnan(estimate.error) else f" ± {estimate.error:.4f}"
  return f"{estimate.mean:{form}}{error}"


def _p_value(less: Estimate) -> str:
  if math.isnan(less.p_value):
    return "-"
  return f"{less.p_value:.3f}" if less.p_value >= 0.001 else "< 0.001"


def _verdict(sweep: Sweep, less: Estimate) -> str:
  """Says whether a cell is better than its base, by more than two standard errors.

  Before all seeds that the sweep gives every cell have been run, nothing is decided.
  """
  if less.count < max(len(sweep.seeds), 2):
    return "too few seeds"
  if not less.decided:
    return "undecided"
  return "better" if (less.mean > 0) == sweep.higher_is_better else "worse"


def markdown(sweep: Sweep, planned: list[PlannedCell], results: Results, command: str) -> str:
  """Returns the table with its question, its command and what the columns mean."""
  table = markdown_table(rows(sweep, planned, results), slice(1, -_TEXTS))
  return "\n\n".join([
      f"# {sweep.question or 'Results'}", f"`{command}`", _explained(sweep), table,
  ]) + "\n"


def _explained(sweep: Sweep) -> str:
  better = "higher" if sweep.higher_is_better else "lower"
  more = (
      " Undecided cells get more seeds, one at a time, while there are any. That favours verdicts, "
      "and p takes no account of it: of cells without any effect 26 % get a verdict with three "
      "seeds and two more."
  ) if sweep.more_seeds else ""
  return (
      f"{sweep.metric} is that after the last step, the mean over seeds ± its standard error; "
      f"{better} is better. \"less base\" is the mean difference to the cell under \"base\", "
      "taken seed by seed, with the same order of the data. A verdict needs two standard errors, "
      "which hold 82 % of such means with three seeds and 88 % with five: p is the two-sided "
      "p-value of a paired t-test with n - 1 degrees of freedom, not corrected for the number of "
      f"cells.{more} FLOPs are the model's, by formula; tokens/s the median of the runs, as they "
      "ran. \"time\" is that of a run's training at this speed, without compiling and scoring; "
      "\"by FLOPs\" is an estimate: what it would be if the cell did its FLOPs as fast as its "
      "base does. \"equal\" says what a cell has in common with the others."
  )


def write_all(
    sweep: Sweep, planned: list[PlannedCell], results: Results, command: str, record: epath.Path
) -> list[epath.Path]:
  """Writes the table, the picture and an HTML page with both beside the record; returns the paths.

  Args:
    sweep: the sweep.
    planned: its cells.
    results: what is finished.
    command: the command that made them.
    record: the path of the results, whose ending is replaced.
  """
  record.parent.mkdir(parents=True, exist_ok=True)
  png = picture(sweep, results)
  page = Page(sweep.question or "Results", f"Experiment {sweep.experiment}")
  page.section("Table")
  page.table(rows(sweep, planned, results))
  page.text(_explained(sweep))
  page.section("Differences")
  page.picture(png, "each cell's difference to its base, with two standard errors")
  page.section("Cells")
  common, differing = _settings(planned)
  page.table([("cell", "settings"), *differing])
  if common:
    page.text(f"All cells have {common}.")
  page.preformatted(command)
  written = {
      ".md": markdown(sweep, planned, results, command).encode(), ".png": png,
      ".html": page.html().encode(),
  }
  for suffix, content in written.items():
    write_atomically(record.with_suffix(suffix), content)
  return [record.with_suffix(suffix) for suffix in written]


def _settings(planned: list[PlannedCell]) -> tuple[str, list[tuple[str, str]]]:
  """Returns the overrides that all cells share, and (name, the others) of each cell."""
  first, *others = (each.overrides.items() for each in planned)
  common = set(first).intersection(*others)

  def text(items: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{key}={value}" for key, value in items)

  differing = [
      (each.cell.name, text(item for item in each.overrides.items() if item not in common))
      for each in planned
  ]
  return text(sorted(common)), differing


def picture(sweep: Sweep, results: Results) -> bytes:
  """Draws each cell's difference to its base, with two standard errors; returns a PNG file."""
  from matplotlib.figure import Figure

  names, means, errors = [], [], []
  for cell in sweep.cells:
    less = difference(sweep, results, cell)
    if cell.name != sweep.base_of(cell).name and less.count:
      names.append(f"{cell.name} (n = {less.count})")
      means.append(less.mean)
      errors.append(0.0 if math.isnan(less.error) else 2 * less.error)
  figure = Figure(figsize=(6, 1.2 + 0.32 * max(len(names), 1)), layout="constrained")
  axes = figure.subplots()
  places = list(range(len(names)))
  axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
  axes.axvline(0, color="gray", linewidth=1)
  axes.set_yticks(places, names)
  axes.set_ylim(max(len(names), 1) - 0.5, -0.5)  # The first cell on top.
  axes.set_xlabel(f"{sweep.metric} less that of its base\n(bars: two standard errors)")
  axes.grid(alpha=0.3)
  image = io.BytesIO()
  figure.savefig(image, dpi=120)
  return image.getvalue()
