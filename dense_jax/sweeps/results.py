"""Results of finished runs of a sweep: a file with one JSON object a line."""

import dataclasses
import json
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence

from etils import epath

from dense_jax import experiment
from dense_jax.data import order
from dense_jax.errors import InputError
from dense_jax.files import locked, parse_json, write_atomically
from dense_jax.runs import resume
from dense_jax.runs.recording import OF_MACHINE
from dense_jax.runs.workdir import CHECKPOINTS, DATA_FILE
from dense_jax.sweeps.budgets import PlannedCell, course_digest, scored_rows
from dense_jax.training.metrics import read_metrics
from dense_jax.training.stored import Stored, saved_steps


@dataclasses.dataclass(frozen=True)
class Result:
  """The figures of a finished run.

  Attributes:
    cell: the cell's name.
    seed: the run's seed.
    course: digest of all settings that determine what the run computes, but for seed and text.
    data: fingerprint of text and tokenizer, and the version of the order of rows
      (`dense_jax.data.order`); that of a run whose order was grain's has the first alone.
    parameters, tokens, flops: as in `PlannedCell`.
    tokens_per_second: the median of the run's records.
    metrics: name -> the number after the last step.
    scored_rows: as in `PlannedCell`; None in records from before it was kept.
  """

  cell: str
  seed: int
  course: str
  data: str
  parameters: int
  tokens: int
  flops: int
  tokens_per_second: float
  metrics: Mapping[str, float]
  scored_rows: int | None = None


_ORDER = " order {}"  # Follows the fingerprint in `Result.data`.
_FIELDS = {field.name for field in dataclasses.fields(Result)}


def collect(planned: PlannedCell, seed: int, workdir: epath.Path) -> Result | None:
  """Reads what the run in a folder has shown; None means that it is not finished.

  Raises:
    InputError: the folder holds another run than this cell's, or its checkpoint is damaged.
  """
  steps = planned.config.train.steps
  if steps not in saved_steps(workdir / CHECKPOINTS):
    return None
  config = experiment.read(workdir)
  records = read_metrics(workdir)
  last = {
      name: value for record in records if record["step"] == steps
      for name, value in record.items() if not name.startswith("layers/")
  }
  wanted, had = planned.course, resume.course(config)
  differing = [key for key in wanted | had if wanted.get(key) != had.get(key)]
  if differing or config.seed != seed:
    raise InputError(
        f"{workdir} holds a run with other values of {', '.join(differing) or 'seed'} than the "
        f"sweep's cell {planned.cell.name!r}: expected another --workdir, or another cell's name"
    )
  data = parse_json((workdir / DATA_FILE).read_bytes())["fingerprint"]
  saved = Stored(workdir / CHECKPOINTS, steps)
  if ordered := saved.position(saved.proof()).get("order"):
    data += _ORDER.format(ordered["version"])
  speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
  metrics = {name: value for name, value in last.items()
             if name != "step" and name not in OF_MACHINE}
  return Result(
      planned.cell.name, seed, course_digest(planned), data,
      planned.parameters, planned.tokens, planned.flops, statistics.median(speeds), metrics,
      scored_rows(config),
  )


def read_results(file: epath.Path) -> Iterator[tuple[int, Result]]:
  """Yields the lines of a file of results, with their numbers from 1 on.

  Raises:
    InputError: a line is damaged.
  """
  *lines, _ = file.read_text().split("\n")
  for number, line in enumerate(lines, 1):
    try:
      values = parse_json(line.encode())
      if not (isinstance(values, dict) and _FIELDS - {"scored_rows"} <= values.keys() <= _FIELDS):
        raise ValueError(f"expected an object with {', '.join(sorted(_FIELDS))}")
    except ValueError as error:
      raise InputError(f"{file}:{number} is damaged: {error}") from error
    yield number, Result(**values)


class Results:
  """The file of a sweep's results; a line is appended for each finished run.

  A last line that a kill cut off is dropped. Every change replaces the file as a whole, so that it
  is never half written. Several sweeps may write one file: each reads it again before it writes.
  """

  def __init__(self, file: epath.Path, planned: Sequence[PlannedCell], metric: str) -> None:
    """Reads the file, if there is one.

    Raises:
      InputError: a line is damaged, or is the result of other settings, or of other text, than the
        sweep's.
    """
    self._file, self._metric = file, metric
    self._lines: dict[tuple[str, int], Result] = {}
    self._courses = {each.cell.name: course_digest(each) for each in planned}
    self._read()

  def _read(self) -> None:
    """Takes over the lines of the file, to which other sweeps may have added."""
    before, self._lines = self._lines, {}
    for number, result in read_results(self._file) if self._file.is_file() else ():
      if self._courses.get(result.cell, result.course) != result.course:
        raise InputError(
            f"{self._file}:{number}: cell {result.cell!r} was run with other settings than the "
            "sweep has now: expected another name for the changed cell, or another file (--record)"
        )
      self._check(result)
      self._lines[result.cell, result.seed] = result
    for key, result in before.items():
      self._lines.setdefault(key, result)

  def _check(self, result: Result) -> None:
    if self._metric not in result.metrics:
      raise InputError(
          f"metric = {self._metric!r} is not valid: expected one that the runs record, of "
          f"{', '.join(sorted(result.metrics))}"
      )
    for other in self._lines.values():
      if other.data != result.data:
        raise InputError(
            f"{self._file}: cell {result.cell!r} (seed {result.seed}) saw other text, another "
            f"tokenizer or another order of rows than {other.cell!r} (seed {other.seed}): expected "
            "the same for all cells"
        )
      if None not in (scored := {other.scored_rows, result.scored_rows}) and len(scored) > 1:
        raise InputError(
            f"{self._file}: the loss of cell {result.cell!r} (seed {result.seed}) is of "
            f"{result.scored_rows or 'all'} held-out rows, that of {other.cell!r} (seed "
            f"{other.seed}) of {other.scored_rows or 'all'}: expected the same train.eval_batches"
        )

  def __contains__(self, key: tuple[str, int]) -> bool:
    """Returns whether a cell's run with a seed is finished; the key is (name, seed)."""
    return key in self._lines

  def add(self, result: Result) -> None:
    """Adds a finished run.

    Raises:
      InputError: it does not have the metric, or saw other text than the others; or what another
        sweep has added to the file does not go with this one.
    """
    self._file.parent.mkdir(parents=True, exist_ok=True)
    with locked(self._file):
      self._read()
      self._check(result)
      self._lines[result.cell, result.seed] = result
      lines = [json.dumps(dataclasses.asdict(each)) for each in self._lines.values()]
      write_atomically(self._file, "".join(line + "\n" for line in lines).encode())

  def adopt(self, record: epath.Path, seeds: Collection[int]) -> int:
    """Takes from another sweep's file the runs that are this sweep's too; returns how many.

    They are those of the same settings and seed, whatever the cell's name is there.

    Args:
      record: the other file.
      seeds: the seeds that are wanted.

    Raises:
      InputError: a line of the file is damaged, or a run saw other text than those of this sweep,
        or rows in another order than this version's.
    """
    adopted = [
        dataclasses.replace(result, cell=cell)
        for _, result in read_results(record) if result.seed in seeds
        for cell, course in self._courses.items()
        if course == result.course and (cell, result.seed) not in self
    ]
    for result in adopted:
      if not result.data.endswith(_ORDER.format(order.VERSION)):
        raise InputError(
            f"{record}: cell {result.cell!r} (seed {result.seed}) had its rows in another order "
            "than this version's runs have: expected results of runs of this version"
        )
      self.add(result)
    return len(adopted)

  def of(self, cell: str) -> dict[int, Result]:
    """Returns the results of a cell by seed."""
    return {seed: each for (name, seed), each in self._lines.items() if name == cell}

  def values(self, cell: str) -> dict[int, float]:
    """Returns the metric of a cell's runs by seed."""
    return {seed: each.metrics[self._metric] for seed, each in self.of(cell).items()}

