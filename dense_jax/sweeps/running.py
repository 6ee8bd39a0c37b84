"""Runs what is left of a sweep: each run is a process of its own, several side by side."""

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import tqdm
from etils import epath

from dense_jax.config import invalid
from dense_jax.files import is_remote
from dense_jax.sweeps.budgets import PlannedCell
from dense_jax.sweeps.definition import Sweep
from dense_jax.sweeps.differences import undecided
from dense_jax.sweeps.results import Results, collect
from dense_jax.training.lock import RunLock

_LOOK_SECONDS = 0.2
_LAST_LINES = 3
# Variables that say how much of a GPU's memory a process takes, and the part that runs share.
_SHARES = {
    "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE",
}
_SHARED_MEMORY = 0.9

Command = Callable[["Job"], list[str]]


@dataclasses.dataclass(frozen=True)
class Job:
  """A run of a sweep: a cell with a seed.

  Attributes:
    planned: the cell.
    seed: the seed.
    experiment: the experiment that the cell changes.
    workdir: the run's folder.
  """

  planned: PlannedCell
  seed: int
  experiment: str
  workdir: epath.Path

  @property
  def key(self) -> tuple[str, int]:
    """The cell's name and the seed."""
    return self.planned.cell.name, self.seed

  @property
  def arguments(self) -> list[str]:
    """The arguments of `dense-jax train`."""
    changes = [f"--config.{key}={value}" for key, value in self.planned.overrides.items()]
    return ["--config", self.experiment, "--workdir", os.fspath(self.workdir), *changes,
            f"--config.seed={self.seed}"]

  def describe(self) -> str:
    """Returns the cell's name with the seed."""
    return f"{self.planned.cell.name}, seed {self.seed}"


def train_command(job: Job) -> list[str]:
  """Returns the command that trains a run."""
  return [sys.executable, "-m", "dense_jax.cli.train", *job.arguments]


def jobs(sweep: Sweep, planned: Sequence[PlannedCell], folder: epath.Path,
         seeds: Sequence[int]) -> Iterator[Job]:
  """Yields the runs of all cells: first those of the first seed, so that a table comes early."""
  for seed in seeds:
    for each in planned:
      workdir = folder / each.cell.folder / f"seed{seed}"
      yield Job(each, seed, sweep.experiment, workdir)


def next_jobs(
    sweep: Sweep, planned: Sequence[PlannedCell], folder: epath.Path, results: Results,
    failed: Collection[tuple[str, int]] = (),
) -> list[Job]:
  """Returns the runs that are still to be done and depend on no other: empty at the sweep's end.

  Runs that are finished in their folder, but not among the results, are collected first. After the
  runs of `sweep.seeds` come those of `sweep.more_seeds`, one seed at a time, of cells whose
  difference to their base is undecided, and of those bases. Runs that have failed, given by their
  keys, hold up no others.
  """
  left = _unfinished(jobs(sweep, planned, folder, sweep.seeds), results, failed)
  if left:
    return left
  for seed in sweep.more_seeds:
    names = undecided(sweep, results)
    names |= {sweep.base_of(sweep.cell(name)).name for name in names}
    chosen = [each for each in planned if each.cell.name in names]
    left = _unfinished(jobs(sweep, chosen, folder, [seed]), results, failed)
    if left:
      return left
  return []


def _unfinished(
    all_jobs: Iterator[Job], results: Results, failed: Collection[tuple[str, int]]
) -> list[Job]:
  left = []
  for job in all_jobs:
    if job.key in results or job.key in failed:
      continue
    found = collect(job.planned, job.seed, job.workdir)
    if found is None:
      left.append(job)
    else:
      results.add(found)
  return left


def _environment(side_by_side: int) -> dict[str, str]:
  """Returns the environment of a run, with its share of a GPU's memory unless the user set one."""
  own = dict(os.environ)
  if side_by_side > 1 and _SHARES.isdisjoint(own):
    own["XLA_CLIENT_MEM_FRACTION"] = f"{_SHARED_MEMORY / side_by_side:.3f}"
  return own


def _all_cores() -> set[int]:
  """Returns the cores that this process may use; none where the system does not tell, as macOS."""
  return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _shares(side_by_side: int) -> list[set[int]]:
  """Returns the cores of each of several runs side by side."""
  cores = sorted(_all_cores())
  return [set(cores[i::side_by_side]) or set(cores) for i in range(side_by_side)]


@contextlib.contextmanager
def on_one_share(side_by_side: int) -> Iterator[None]:
  """Holds this process on the cores that one of several runs side by side has."""
  with _pinned(_shares(side_by_side)[0]):
    yield


@contextlib.contextmanager
def _pinned(cores: set[int]) -> Iterator[None]:
  """Holds this process on some cores; a child inherits them, and sizes its thread pool by them."""
  before = _all_cores()
  if not before:
    yield
    return
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


class _Process:
  """A run's process, on cores of its own, with its output in a file beside the run's folder."""

  def __init__(self, job: Job, command: list[str], cores: set[int], side_by_side: int) -> None:
    self.job, self.cores = job, cores
    self.log = job.workdir.parent / f"log_{job.workdir.name}.txt"  # Not one of seed*, the runs.
    job.workdir.parent.mkdir(parents=True, exist_ok=True)
    with self.log.open("wb") as output, _pinned(cores):
      self.process = subprocess.Popen(
          command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
          env=_environment(side_by_side),
      )

  def why(self) -> str:
    """Returns the last lines that the process printed."""
    lines = self.log.read_bytes().decode(errors="replace").splitlines()
    return " / ".join(line for line in lines[-_LAST_LINES:] if line.strip())


def run_jobs(
    todo: Sequence[Job], results: Results, *, side_by_side: int, say: Callable[[str], None],
    command: Command = train_command, deadline: float = math.inf,
) -> dict[tuple[str, int], str]:
  """Runs jobs, each in a process, and adds what they show to the results.

  A request to end is passed on, and so is the deadline: the runs save what they have, and the next
  call goes on with them.

  Args:
    todo: the runs.
    results: grows by each run that finishes.
    side_by_side: how many run at a time, each on its share of the cores.
    say: called with a line for each run that finishes or fails.
    command: job -> the command that runs it.
    deadline: the time, by `time.monotonic`, after which no run starts, and those that run end.

  Returns:
    (name, seed) -> what a run that failed printed last.
  """
  shares = _shares(side_by_side)
  waiting, running = list(todo), list[_Process]()
  failed: dict[tuple[str, int], str] = {}
  late = False
  with tqdm.tqdm(total=len(waiting), unit="run", disable=not sys.stderr.isatty()) as bar:
    try:
      while running or (waiting and not late):
        if not late and time.monotonic() >= deadline:
          late = True
          for each in running:
            each.process.terminate()
        while waiting and not late and len(running) < side_by_side:
          free = next(cores for cores in shares if all(each.cores is not cores for each in running))
          job = waiting.pop(0)
          running.append(_Process(job, command(job), free, side_by_side))
        time.sleep(_LOOK_SECONDS)
        for each in [each for each in running if each.process.poll() is not None]:
          running.remove(each)
          bar.update()
          if not _finish(each, results, say):
            if late:
              say(f"{each.job.describe()}: ended by the limit, as {each.why()}")
            else:
              failed[each.job.key] = f"status {each.process.returncode}: {each.why()}"
              say(f"{each.job.describe()}: failed with {failed[each.job.key]} (see {each.log})")
    finally:
      for each in running if not late else ():  # A second request would end a run that saves.
        each.process.terminate()
      for each in running:
        each.process.wait()
  return failed


def run_sweep(
    sweep: Sweep, planned: Sequence[PlannedCell], folder: epath.Path, results: Results, *,
    side_by_side: int, say: Callable[[str], None], deadline: float = math.inf,
) -> dict[tuple[str, int], str]:
  """Does all runs of a sweep that are left, those of more seeds included; see `run_jobs`.

  Raises:
    InputError: the folder is in a bucket, or another process runs a sweep in it.
  """
  if is_remote(folder):
    raise invalid(
        "--workdir", os.fspath(folder), "a folder on this machine, or --commands, whose runs may "
        "be in a bucket",
    )
  failed: dict[tuple[str, int], str] = {}
  lock = RunLock(folder, say)
  try:
    while todo := next_jobs(sweep, planned, folder, results, failed):
      if time.monotonic() >= deadline:
        say(f"the limit is reached, and {len(todo)} runs are left: the same command goes on")
        break
      say(f"{len(todo)} runs are left, {side_by_side} at a time")
      failed |= run_jobs(todo, results, side_by_side=side_by_side, say=say, deadline=deadline)
  finally:
    lock.release()
  return failed


def _finish(ended: _Process, results: Results, say: Callable[[str], None]) -> bool:
  """Takes the result of a process that has ended; returns False if there is none."""
  job = ended.job
  found = None if ended.process.returncode else collect(job.planned, job.seed, job.workdir)
  if found is None:
    return False
  results.add(found)
  value = results.values(job.planned.cell.name)[job.seed]
  say(f"{job.describe()}: {value:.4f}, {found.tokens_per_second:,.0f} tokens/s")
  return True
