"""The fault campaign: puts faults into runs, and shows that they end as the unbroken run ends.

    python -m tests.faults.campaign --size short         # seconds: what `make test` runs
    python -m tests.faults.campaign --size part          # minutes: what .ci/run runs
    python -m tests.faults.campaign                      # more than a hundred kills, by hand
    python -m tests.faults.campaign --scale 10 --seed 3  # an hour or two

It prints a table, and writes it with --output; the status is 1 if a fault was not survived. All
runs are tiny ones, in children of this process (`children.py`). What is random follows from --seed.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

from tests.faults.runs import Outcome


@dataclasses.dataclass(frozen=True)
class Scale:
  """How many faults of each kind: kills at random times and operations, and so on."""

  random_kills: int = 36
  operation_kills: int = 48
  rounds_of_moments: int = 2
  process_kills: int = 4
  stops: int = 2
  clocks: int = 2
  damage: float = 1.0
  whole_runs: int = 3
  disks: int = 2
  numbers: int = 2

  def times(self, factor: int) -> "Scale":
    """Returns the scale with so many times the faults."""
    values = {name: value * factor for name, value in dataclasses.asdict(self).items()}
    return Scale(**{**values, "damage": self.damage})


SIZES = {
    "short": Scale(1, 2, 0, 0, 0, 0, 0.06, 0, 0, 0),
    "part": Scale(0, 0, 1, 1, 1, 1, 0.02, 1, 1, 0),
    "whole": Scale(),
}


def run(scale: Scale, folder: pathlib.Path, seed: int, jobs: int) -> Iterator[Outcome]:
  """Yields the outcome of each trial."""
  from tests.faults import children, damage, disks, kills, numbers
  from tests.faults.runs import STEPS, Base

  children.warm_up()
  base = Base(folder)
  logs = folder / "logs"
  logs.mkdir()
  unbroken, many = folder / "unbroken", folder / "many"

  def first():
    for workdir, *more in ((unbroken,), (many, "--config.train.keep_last=9")):
      [child] = yield [base.train(workdir, *more)]
      if child.status:
        raise RuntimeError(f"the unbroken run failed: {child.said}")
      if workdir == unbroken:
        base.remember(workdir)
    if base.difference(many):
      raise RuntimeError(f"the same run is not equal: {base.difference(many)}")
    return child  # It had all programs from the cache, and tells how long a run takes.

  [timed] = children.run_all([first()], logs, 1)
  print(f"an unbroken run takes {timed.seconds:.1f} s and {len(timed.operations)} file operations",
        flush=True)

  def trials():
    yield from kills.chains(base, seed, kills.RANDOM, scale.random_kills, timed)
    yield from kills.chains(base, seed, kills.OPERATION, scale.operation_kills, timed)
    for turn in range(scale.rounds_of_moments):
      yield from kills.moments(base, seed + turn, bool(turn))
    yield from kills.stops(base, seed, scale.stops, timed.seconds)
    yield from kills.clocks(base, scale.clocks)
    yield damage.trial(base, many, seed, scale.damage)
    yield from damage.whole_runs(base, unbroken, seed, scale.whole_runs)
    if scale.disks and not disks.can_mount():
      print("no tmpfs can be mounted here: disks are left out", flush=True)
    elif scale.disks:
      size = sum(file.stat().st_size for file in (unbroken / "checkpoints" / str(STEPS)).rglob("*"))
      yield from disks.trials(base, seed, scale.disks, size)
      yield from numbers.full_in_prepare(base, seed, scale.disks)
    yield from numbers.trials(base, seed, scale.numbers)
    if scale.process_kills:
      yield kills.of_two_processes(base, seed, scale.process_kills)

  for outcome in children.run_all(trials(), logs, jobs):
    yield from outcome if isinstance(outcome, list) else [outcome]


def table(outcomes: Sequence[Outcome]) -> str:
  """Returns the table in Markdown: for each row its tries, survivals and steps lost."""
  rows: dict[str, list[Outcome]] = defaultdict(list)
  for outcome in outcomes:
    rows[outcome.row].append(outcome)
  lines = ["| fault | tries | survived | steps lost: mean | most |", "|---|---|---|---|---|"]
  for row, found in rows.items():
    tries = sum(outcome.tries for outcome in found)
    failed = sum(bool(outcome.wrong) for outcome in found)
    lost = [steps for outcome in found for steps in outcome.steps_lost]
    mean, most = (f"{sum(lost) / len(lost):.1f}", f"{max(lost)}") if lost else ("", "")
    lines.append(f"| {row} | {tries} | {tries - failed} | {mean} | {most} |")
  return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
  """Runs the campaign; returns 1 if a fault was not survived."""
  command = argparse.ArgumentParser(prog="python -m tests.faults.campaign")
  command.add_argument("--size", choices=SIZES, default="whole", help="how many of each kind")
  command.add_argument("--scale", type=int, default=1, help="how many times as many")
  command.add_argument("--seed", type=int, default=0)
  command.add_argument("--jobs", type=int, default=2, help="trials side by side (default 2)")
  command.add_argument("--output", metavar="FILE", help="write the table there")
  options = command.parse_args(arguments)
  scale = SIZES[options.size].times(options.scale)
  began = time.monotonic()
  outcomes = []
  with tempfile.TemporaryDirectory(prefix="faults-") as folder:
    for outcome in run(scale, pathlib.Path(folder), options.seed, options.jobs):
      outcomes.append(outcome)
      if outcome.wrong:
        print(f"NOT SURVIVED: {outcome.row}: {outcome.wrong}", flush=True)
  text = table(outcomes)
  print(f"{text}{time.monotonic() - began:.0f} s, seed {options.seed}")
  if options.output:
    pathlib.Path(options.output).write_text(text)
  return 1 if any(outcome.wrong for outcome in outcomes) else 0


if __name__ == "__main__":
  # Before jax is imported, which reads it then.
  os.environ.update({
      "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/dense_jax/faults"),
  })
  sys.exit(main(sys.argv[1:]))
