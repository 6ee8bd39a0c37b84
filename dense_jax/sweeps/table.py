"""A sweep's results as a table in Markdown, and as a picture."""

import io
import math
import statistics

from etils import epath

from dense_jax.files import write_atomically
from dense_jax.runs.page import Page
from dense_jax.sweeps.budgets import PlannedCell
from dense_jax.sweeps.definition import Sweep
from dense_jax.sweeps.results import Results
from dense_jax.sweeps.statistics import Estimate, difference

_HEADER = ("cell", "parameters", "tokens", "TFLOP", "tokens/s", "seeds", "{metric}",
           "less that of its base", "verdict", "equal")


def rows(sweep: Sweep, planned: list[PlannedCell], results: Results) -> list[tuple[str, ...]]:
  """Returns the table's rows, the header first; cells without results have dashes."""
  table = [tuple(name.format(metric=sweep.metric) for name in _HEADER)]
  for each in planned:
    cell, found = each.cell, results.of(each.cell.name)
    speeds = [result.tokens_per_second for result in found.values()]
    speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
    mean = Estimate.of(list(results.values(cell.name).values()))
    is_base = cell.name == sweep.base_of(cell).name
    less = difference(sweep, results, cell)
    of_base = "" if is_base else f"{_number(less, '+.4f')} of {sweep.base_of(cell).name}"
    table.append((
        cell.name, f"{each.parameters:,}", f"{each.tokens:,}", f"{each.flops / 1e12:,.0f}", speed,
        str(len(found)), _number(mean, ".4f"), of_base,
        "" if is_base else _verdict(sweep, less), cell.equal,
    ))
  return table


def _number(estimate: Estimate, form: str) -> str:
  if not estimate.count:
    return "-"
  error = "" if math.isnan(estimate.error) else f" ± {estimate.error:.4f}"
  return f"{estimate.mean:{form}}{error}"


def _verdict(sweep: Sweep, less: Estimate) -> str:
  """Says whether a cell is better than its base: by more than two standard errors."""
  if less.count < 2:
    return "too few seeds"
  if not less.decided:
    return "undecided"
  return "better" if (less.mean > 0) == sweep.higher_is_better else "worse"


def markdown(sweep: Sweep, planned: list[PlannedCell], results: Results, command: str) -> str:
  """Returns the table with its question, its command and what the columns mean."""
  head, *body = rows(sweep, planned, results)
  rule = ("---", *["---:"] * (len(head) - 3), "---", "---")
  lines = [f"| {' | '.join(row)} |" for row in (head, rule, *body)]
  return "\n".join([
      f"# {sweep.question or 'Results'}", "", f"`{command}`", "", _explained(sweep), "", *lines, "",
  ])


def _explained(sweep: Sweep) -> str:
  better = "higher" if sweep.higher_is_better else "lower"
  return (
      f"{sweep.metric} is that after the last step, the mean over seeds ± its standard error; "
      f"{better} is better. Differences are taken seed by seed, with the same order of the data. "
      "A verdict needs two standard errors. FLOPs are the model's, by formula; tokens/s the "
      "median of the runs, as they ran. \"equal\" says what a cell has in common with the others."
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
  page = Page(sweep.question or "Results", f"{command} ({sweep.experiment})")
  page.section("Table")
  page.table(rows(sweep, planned, results))
  page.text(_explained(sweep))
  page.section("Differences")
  page.picture(png, "each cell's difference to its base, with two standard errors")
  page.section("Cells")
  page.table([("cell", "settings"), *(
      (each.cell.name, ", ".join(f"{key}={value}" for key, value in each.overrides.items()))
      for each in planned)])
  written = {
      ".md": markdown(sweep, planned, results, command).encode(), ".png": png,
      ".html": page.html().encode(),
  }
  for suffix, content in written.items():
    write_atomically(record.with_suffix(suffix), content)
  return [record.with_suffix(suffix) for suffix in written]


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
  figure = Figure(figsize=(7, 1.2 + 0.32 * max(len(names), 1)), layout="constrained")
  axes = figure.subplots()
  places = list(range(len(names)))
  axes.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
  axes.axvline(0, color="gray", linewidth=1)
  axes.set_yticks(places, names)
  axes.invert_yaxis()
  axes.set_xlabel(f"{sweep.metric} less that of the base (bars: two standard errors)")
  axes.grid(alpha=0.3)
  image = io.BytesIO()
  figure.savefig(image, dpi=120)
  return image.getvalue()
