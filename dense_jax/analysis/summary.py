"""Lines of a file for each run that is looked into, and tables of their means."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from dense_jax.analysis.model import Seen
from dense_jax.errors import InputError
from dense_jax.files import endings, locked, whole_path, write_atomically
from dense_jax.formatting import markdown_table
from dense_jax.statistics import Estimate

# The layers that tables have, by the share of the way from the first layer to the last.
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Summary:
  """The figures of one run that tables compare, from `Seen`.

  Attributes:
    workdir: the run's folder.
    run: its name, with the checkpoint.
    seen: how the text was looked at: tokens of a row, rows, tokens with states.
    loss: mean loss at positions [0, 16), [16, 32), [32, 64), ..., nats.
    recovered: for each layer, how much of its state a probe recovers from the last one's; this and
      the next are empty for a model without states.
    rank: effective rank of each layer's state.
    lens: loss if the head follows each layer, nats.
    gradient, cut_gradient: norm of the gradient that reaches each layer from the last one, and of
      that without dense paths.
    shares: for each layer, the RMS of each source's read over that of its own.
  """

  workdir: str
  run: str
  seen: dict[str, int]
  loss: list[float]
  recovered: list[float]
  rank: list[float]
  lens: list[float]
  gradient: list[float]
  cut_gradient: list[float]
  shares: list[list[float]]


def borders(length: int) -> list[int]:
  """Returns the positions between which losses are averaged: 0, 16, 32, 64, ..., length."""
  doubled = [16 * 2**power for power in range(max(0, math.ceil(math.log2(length / 16))))]
  return [0, *doubled, length]


def _cell_of(workdir: str) -> str:
  """Returns the folder, or its parent if it is one seed of a sweep's cell."""
  folder = epath.Path(whole_path(workdir))
  is_seed = folder.name.removeprefix("seed").isdigit()
  return os.fspath(folder.parent if is_seed else folder)


def summarize(run: str, workdir: str, rows: int, seen: Seen) -> Summary:
  """Makes a run's line, of figures with four digits.

  Args:
    run: its name.
    workdir: its folder.
    rows: of text that were looked at.
    seen: the figures.
  """
  edges = borders(len(seen.loss_at))
  states = seen.similarity.get("state", {})
  return Summary(
      workdir=workdir, run=run,
      seen={"length": len(seen.loss_at), "rows": rows, "samples": seen.samples},
      loss=_rounded([
          _mean(seen.loss_at[begin:end], seen.targets_at[begin:end])
          for begin, end in itertools.pairwise(edges)
      ]),
      recovered=_rounded(states["probe"][:, -1]) if states else [],
      rank=_rounded(seen.rank.get("state", [])), lens=_rounded(seen.lens),
      gradient=_rounded(seen.gradient[-1]), cut_gradient=_rounded(seen.cut_gradient[-1]),
      shares=[
          _rounded([value for name, value in layer.items() if name.endswith("_ratio")])
          for layer in seen.layers
      ],
  )


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
  """Returns the weighted mean, in which a weight of 0 leaves out a NaN; NaN without weights."""
  total = weights.sum()
  return float(np.where(weights, values * weights, 0).sum() / total) if total else math.nan


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
  return [float(f"{value:.4g}") for value in values]


def read_summaries(file: epath.Path) -> dict[str, Summary]:
  """Returns a file's lines by the run's folder; none if there is no file.

  Raises:
    InputError: a line is damaged.
  """
  found: dict[str, Summary] = {}
  lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
  for number, line in enumerate(lines, 1):
    try:
      summary = Summary(**json.loads(line))
    except (ValueError, TypeError) as error:
      raise InputError(f"{file}:{number} is damaged: expected the figures of a run ({error})"
                       ) from error
    found[summary.workdir] = summary
  return found


def add_summary(file: epath.Path, summaries: dict[str, Summary], summary: Summary) -> None:
  """Adds a run's line to the file, and what other processes have written there to `summaries`.

  Args:
    file: the record, which need not exist.
    summaries: the runs that are known, by their folders; changed in place.
    summary: the run.

  Raises:
    InputError: the run was looked at in another way than those before, or a line is damaged.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  with locked(file):
    summaries |= read_summaries(file)
    for other in summaries.values():
      if other.seen != summary.seen:
        raise InputError(
            f"{summary.workdir} was looked at with {summary.seen}, and {other.workdir} in {file} "
            f"with {other.seen}: expected the same --length, --batches, --batch-size and "
            "--samples, or another file (--record)"
        )
    summaries[summary.workdir] = summary
    lines = [json.dumps(dataclasses.asdict(each)) for each in summaries.values()]
    write_atomically(file, "".join(line + "\n" for line in lines).encode())


def groups(summaries: Mapping[str, Summary]) -> dict[str, list[Summary]]:
  """Returns the runs of each group, which differ in their seeds alone, in the order of the file.

  A group is named by its folder, with as much of the path as tells it from the others.
  """
  found: dict[str, list[Summary]] = {}
  for summary in summaries.values():
    found.setdefault(_cell_of(summary.workdir), []).append(summary)
  names = (name.replace("_", " ") for name in endings(found))
  return dict(zip(names, found.values(), strict=True))


def mean(values: Sequence[float]) -> str:
  """Formats the mean of some runs and its standard error, which takes two; a dash for NaN."""
  found = Estimate.of(values)
  if math.isnan(found.mean):
    return "-"
  digits = 3 if abs(found.mean) < 10 else 1 if abs(found.mean) < 100 else 0
  error = f" ± {found.error:.{digits}f}" if found.count > 1 else ""
  return f"{found.mean:.{digits}f}{error}"


def markdown(summaries: Mapping[str, Summary], command: str) -> str:
  """Returns tables of the means of all groups.

  Args:
    summaries: the runs.
    command: what made the file.
  """
  by_group = groups(summaries)
  length = next(iter(summaries.values())).seen["length"]
  edges = borders(length)
  spans = [f"{begin}-{end - 1}" for begin, end in itertools.pairwise(edges)]
  parts = [
      "# Looking inside", f"`{command}`",
      "Means over the runs of a group, which differ in their seeds, ± their standard error. "
      "docs/evidence.md says what each figure is.",
      "Loss by position in a row, nats:",
      markdown_table([
          ["run", "runs", *spans],
          *([name, str(len(runs)), *map(mean, zip(*(run.loss for run in runs), strict=True))]
            for name, runs in by_group.items()),
      ]),
  ]
  layers: dict[str, Callable[[Summary], list[float]]] = {
      "Share of a layer's state that a linear probe recovers from the last layer's, R²":
          lambda run: run.recovered,
      "Loss if the head follows the layer, nats": lambda run: run.lens,
      "Effective rank of the state": lambda run: run.rank,
      "Gradient that reaches the layer from the last one": lambda run: run.gradient,
      "The same without dense paths": lambda run: run.cut_gradient,
  }
  header = ["run", *("first layer" if not at else "last" if at == 1 else f"{at:.0%}"
                     for at in _DEPTHS)]
  for title, figure in layers.items():
    parts += [f"{title}, by depth:", markdown_table([
        header,
        *([name, *(mean([_at_depth(figure(run), at) for run in runs]) for at in _DEPTHS)]
          for name, runs in by_group.items() if figure(runs[0])),
    ])]
  return "\n\n".join(parts) + "\n"


def _at_depth(values: Sequence[float], share: float) -> float:
  return values[round(share * (len(values) - 1))]
