"""Trains the cells of a sweep with several seeds, and compares them in one table."""

import functools
import math
import shlex
import time
from collections.abc import Sequence

import jax
from etils import epath

from dense_jax.cli import common
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.files import make_path
from dense_jax.formatting import table
from dense_jax.outputs import check_file
from dense_jax.sweeps.budgets import describe_plan, plan
from dense_jax.sweeps.definition import load_sweep
from dense_jax.sweeps.results import Results
from dense_jax.sweeps.running import next_jobs, on_one_share, run_sweep
from dense_jax.sweeps.table import rows, write_all
from dense_jax.sweeps.timing import time_ratio

_EPILOG = """
A finished run is never done again, and one that was ended goes on: the same command continues.
--config.KEY=VALUE changes all cells that do not set the key themselves.
Results are one line a run in --record; beside it lie the table (.md), a plot (.png) and a page that
needs no network (.html).
--limit-minutes ends the sweep in time, on a machine that one has for minutes. On a GPU, runs side
by side (--jobs) share its memory.
--commands prints a training command for each run that is left, for a launcher (see launch/); once
they have ended, --table collects what lies in --workdir, which may be in a bucket.
"""


def main(arguments: Sequence[str]) -> int:
  """Runs what is left of the sweep, and prints its table; returns 1 if a run failed."""
  command = common.parser("sweep", "Runs many variants of an experiment, and compares them.")
  command.epilog = _EPILOG
  command.add_argument("sweep", metavar="FILE.py[:ARG]", help="a sweep, as experiments/sweeps/ has")
  command.add_argument("--workdir", required=True, help="where the runs are kept, one folder each")
  command.add_argument("--record", metavar="FILE.jsonl", help="where results are kept; left out, "
                       "results.jsonl in the workdir")
  command.add_argument("--known", action="append", default=[], metavar="FILE.jsonl",
                       help="another sweep's results: a run of the same settings and seed is taken "
                       "from there; may be given several times")
  command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side, each "
                       "on its share of the cores (default 1)")
  command.add_argument("--limit-minutes", type=float, default=math.inf, metavar="M", help="after M "
                       "minutes start no run, and let those that run save and end")
  command.add_argument("--list", action="store_true", help="print the cells and their budgets only")
  command.add_argument("--commands", action="store_true", help="print the commands of the runs "
                       "that are left only")
  command.add_argument("--table", action="store_true", help="print the table of what is finished "
                       "in --workdir or --record only")
  options, overrides = common.split_overrides(command, arguments)
  if options.jobs < 1:
    raise invalid("--jobs", options.jobs, "an integer >= 1")
  if not options.limit_minutes > 0:
    raise invalid("--limit-minutes", options.limit_minutes, "a number > 0")
  deadline = time.monotonic() + 60 * options.limit_minutes
  jax.config.update("jax_platforms", "cpu")  # Accelerators are the runs' own.
  sweep = load_sweep(options.sweep, overrides)
  folder = make_path(options.workdir, "--workdir")
  record = check_file(options.record or f"{options.workdir}/results.jsonl", "--record")
  if record.suffix != ".jsonl":
    raise invalid("--record", str(record), "the name of a .jsonl file")
  planned = plan(sweep, folder, functools.partial(_time_ratio, options.jobs))
  if options.list:
    print(table(describe_plan(planned)))
    return 0
  results = Results(record, planned, sweep.metric)
  for name in options.known:
    count = results.adopt(_known(name), {*sweep.seeds, *sweep.more_seeds})
    print(f"{count} runs are known from {name}")
  failed: dict[tuple[str, int], str] = {}
  if options.commands or options.table:
    left = next_jobs(sweep, planned, folder, results)  # Collects what has ended in the folder.
    if options.commands:
      for job in left:
        print(shlex.join(["dense-jax", "train", *job.arguments]))
      return 0
  else:
    failed = run_sweep(
        sweep, planned, folder, results, side_by_side=options.jobs,
        say=lambda line: print(line, flush=True), deadline=deadline,
    )
  again = shlex.join(["dense-jax", "sweep", *arguments])
  written = write_all(sweep, planned, results, again, record)
  print(table(rows(sweep, planned, results)))
  print(f"\nresults   {record}")
  for what, file in zip(("table", "plot", "page"), written, strict=True):
    print(f"{what.ljust(9)} {file}")
  for (name, seed), why in failed.items():
    print(f"failed    {name}, seed {seed}: {why}")
  return 1 if failed else 0


def _time_ratio(jobs: int, one: ExperimentConfig, other: ExperimentConfig) -> float:
  """Measures the time of a step over another's, on the cores that a run of the sweep will have."""
  with on_one_share(jobs):
    return time_ratio(one, other)


def _known(name: str) -> epath.Path:
  path = make_path(name, "--known")
  if not path.is_file():
    raise invalid("--known", name, "a sweep's file of results")
  return path


if __name__ == "__main__":
  common.run(main)
