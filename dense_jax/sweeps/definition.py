"""A sweep: cells (changes of one experiment) to compare, seeds, budgets and a metric.

A sweep is a Python file with `get_sweep(arg="") -> Sweep`, named on the command line as FILE.py or
FILE.py:ARG, like an experiment.
"""

import dataclasses
import importlib.util
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dense_jax.config import invalid
from dense_jax.errors import InputError, did_you_mean, raised_by

BUDGETS = ("parameters", "flops", "time")
_MODULE = "sweep_"  # What the names of sweeps' modules begin with.


@dataclasses.dataclass(frozen=True)
class Match:
  """A budget that a cell has in common with another cell.

  Attributes:
    by: "parameters" changes model.width until the numbers of parameters are as near as they get;
      "flops" changes train.steps until training takes as many model FLOPs; "time" changes
      train.steps until training takes as long on this machine.
    cell: the other cell's name. That cell has no `Match` itself.
  """

  by: str
  cell: str


@dataclasses.dataclass(frozen=True)
class Cell:
  """One configuration of a sweep.

  Attributes:
    name: its name in tables.
    overrides: dotted config key -> value.
    base: the name of the cell that it is compared with; "" means the sweep's.
    match: what its budget is set by; None leaves train.steps alone, so that all such cells have as
      many tokens.
  """

  name: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base: str = ""
  match: Match | None = None

  @property
  def folder(self) -> str:
    """The name as a folder's."""
    return re.sub(r"[^a-z0-9.=+-]+", "_", self.name.lower()).strip("_.")

  @property
  def equal(self) -> str:
    """Says what this cell has in common with others: tokens, or what it matches of which cell."""
    return f"{self.match.by} of {self.match.cell}" if self.match else "tokens"

  def texts(self) -> list[tuple[str, str]]:
    """The overrides as a command line has them."""
    return [
        (key, str(value).lower() if isinstance(value, bool) else str(value))
        for key, value in self.overrides.items()
    ]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Cells to train with several seeds each, and to compare.

  A seed determines a run's parameters and the order of its data, so that the difference of two
  cells is taken seed by seed.

  Attributes:
    experiment: the experiment that all cells change, FILE.py[:ARG].
    cells: in the order of the table.
    base: the name of the cell that others are compared with.
    seeds: the seeds of every cell.
    more_seeds: further seeds of the cells whose mean difference to their base is within two
      standard errors of zero, and of that base.
    metric: the number in metrics.jsonl to compare, as it is after the last step.
    higher_is_better: whether a larger metric is a better one.
    question: what the sweep is to answer, in one sentence, for the table's title.
  """

  experiment: str
  cells: tuple[Cell, ...]
  base: str
  seeds: tuple[int, ...] = (0, 1, 2)
  more_seeds: tuple[int, ...] = ()
  metric: str = "heldout_loss"
  higher_is_better: bool = False
  question: str = ""

  def __post_init__(self) -> None:
    if not self.cells or not self.seeds:
      raise InputError("a sweep needs cells and seeds; expected at least one of each")
    names = [cell.name for cell in self.cells]
    for kind, values in (("name", names), ("folder", [cell.folder for cell in self.cells])):
      for value in values:
        if values.count(value) > 1 or not value:
          raise invalid(f"a cell's {kind}", value, "a name that no other cell of the sweep has")
    seeds = (*self.seeds, *self.more_seeds)
    if len(set(seeds)) < len(seeds):
      raise invalid("seeds and more_seeds", seeds, "seeds that differ")
    self.cell(self.base)
    for cell in self.cells:
      self.cell(cell.base or self.base)
      if cell.match and cell.match.by not in BUDGETS:
        raise invalid(f"{cell.name}: match.by", cell.match.by, " or ".join(BUDGETS))
      if cell.match and self.cell(cell.match.cell).match:
        raise invalid(f"{cell.name}: match.cell", cell.match.cell, "a cell without a match")

  def cell(self, name: str) -> Cell:
    """Returns the cell of a name.

    Raises:
      InputError: there is none.
    """
    for cell in self.cells:
      if cell.name == name:
        return cell
    names = [cell.name for cell in self.cells]
    raise InputError(
        f"the sweep has no cell {name!r}{did_you_mean(name, names)} Cells: {', '.join(names)}"
    )

  def debug(self) -> "Sweep":
    """Returns a smoke test: `:debug` of the experiment, the last cell with those it needs, a seed.

    It needs the cell that it is compared with, all that these two name, and so on. What names no
    base is compared with the last cell's.

    Of an experiment with an argument, FILE.py:ARG, it is `:ARG-debug`. That has to set all keys
    that make runs long; overrides of the cells stay.
    """
    last = self.cells[-1]
    base = self.base_of(last).name
    needed, found = set[str](), {last.name, base}
    while found:
      needed |= found
      kept = [self.cell(name) for name in found]
      named = {cell.base for cell in kept} | {cell.match.cell for cell in kept if cell.match}
      found = named - needed - {""}
    cells = tuple(cell for cell in self.cells if cell.name in needed)
    joint = "-" if ":" in self.experiment else ":"
    return dataclasses.replace(
        self, experiment=f"{self.experiment}{joint}debug", cells=cells, base=base,
        seeds=self.seeds[:1],
        more_seeds=(),
    )

  def base_of(self, cell: Cell) -> Cell:
    """Returns the cell that a cell is compared with."""
    return self.cell(cell.base or self.base)


def grid(
    axes: Mapping[str, Sequence[Any]], where: Callable[[Mapping[str, Any]], bool] | None = None
) -> list[Cell]:
  """Makes a cell of every combination of values.

  Args:
    axes: dotted config key -> its values. A cell's name lists the last part of each key with the
      value, such as "depth=2 reads=first".
    where: tells of a combination, key -> value, whether to take it; None takes all.
  """
  cells = []
  for values in itertools.product(*axes.values()):
    chosen = dict(zip(axes, values, strict=True))
    if where is None or where(chosen):
      name = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items())
      cells.append(Cell(name, chosen))
  return cells


def load_sweep(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Sweep:
  """Loads FILE.py or FILE.py:ARG.

  Args:
    spec: the file and its argument.
    overrides: dotted keys with values as texts, for all cells; a cell's own come after them.

  Raises:
    InputError: it is not a file with `get_sweep`, or its sweep is not valid. Of an exception that
      the file raises, it gives the line.
  """
  name, _, argument = spec.partition(":")
  file = pathlib.Path(name)
  if not file.is_file() or file.suffix != ".py":
    raise invalid("sweep", spec, "a sweep file, FILE.py[:ARG]")
  found = importlib.util.spec_from_file_location(f"{_MODULE}{file.stem}", file)
  if found is None or found.loader is None:
    raise invalid("sweep", spec, "a Python file")
  module = importlib.util.module_from_spec(found)
  try:
    found.loader.exec_module(module)
    sweep = module.get_sweep(argument)
  except InputError:
    raise
  except Exception as error:
    raise raised_by(error, file, _MODULE) from error
  if not isinstance(sweep, Sweep):
    raise InputError(f"{file}: get_sweep returned {type(sweep).__name__}, expected a Sweep")
  cells = tuple(
      dataclasses.replace(cell, overrides=dict(overrides) | dict(cell.overrides))
      for cell in sweep.cells
  )
  return dataclasses.replace(sweep, cells=cells)
