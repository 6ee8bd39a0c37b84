"""Speed on a CPU beside an older revision of this project, step by step in turn.

Command   GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.benchmarks.revisions \
              --before REVISION --json experiments/results/cpu_revisions_DATE.json
Rival     the tree of REVISION, which git writes into a temporary folder, in the same environment
Hardware  two cores, float32
Parts     mixer   one mixer, forward and backward
          rows    training of each family in rows of two lengths
          long    training with every layer rematerialised, in one row
          dense   training with dense connections
          decode  decoding of each family, base and dense

A ratio is the median, over pairs of steps, of the older step's time over the present one's: more
than 1 is faster than before. A pair is two steps in each process, one process after the other, of
which the second is timed.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from dense_jax.errors import InputError
from experiments.benchmarks import common, cpu_dense, cpu_lengths, cpu_modes
from experiments.benchmarks.common import SSM_FAMILIES, Size, Table
from experiments.benchmarks.worker import Worker

SCRIPT = pathlib.Path(__file__).with_name("revision_worker.py")
# The least ratio at which a step counts as no slower than before.
BAR = 0.95
PAIRS = 7
PARTS = ("mixer", "rows", "long", "dense", "decode")


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed: `kind` is a request of `revision_worker.py`."""

  name: str
  kind: str
  family: str
  size: Size
  options: dict[str, Any]


def cases(part: str) -> Iterator[Case]:
  """Yields the cases of a part, with the sizes that `cpu` has for it."""
  small = Size(cpu_dense.WIDTH, cpu_dense.LAYERS, cpu_dense.VOCABULARY, 1, cpu_dense.TIME_STEPS)
  if part == "mixer":
    for family in SSM_FAMILIES:
      mixer = {"mixer": {"state_size": cpu_modes.S4_STATE_SIZE}} if family == "s4" else {}
      size = Size(cpu_modes.WIDTH, 1, 2, 1, cpu_modes.TIME_STEPS)
      yield Case(f"{family}, T {size.time_steps}", "mixer", family, size, mixer)
  if part == "rows":
    for family in SSM_FAMILIES:
      for length in cpu_lengths.LENGTHS[::2]:
        size = Size(cpu_lengths.WIDTH, cpu_lengths.LAYERS, 256, 16384 // length, length)
        yield Case(f"{family}, T {length}", "train", family, size, {"remat": "none"})
  if part == "long":
    for family in cpu_lengths.CONSTANT_FAMILIES:
      length = cpu_lengths.CONSTANT_LENGTHS[-1]
      size = Size(cpu_lengths.CONSTANT_WIDTH, cpu_lengths.LAYERS, 256, 1, length)
      yield Case(f"{family}, T {length}", "train", family, size, {"remat": "full"})
  kinds: dict[str, dict[str, object]] = {"base": {}, **cpu_dense.KINDS}
  if part == "dense":
    for family in cpu_dense.FAMILIES:
      for kind, options in kinds.items():
        yield Case(f"{family}, {kind}", "train", family, small, {"dense": options})
  if part == "decode":
    for batch_size in cpu_dense.BATCHES:
      size = dataclasses.replace(small, batch_size=batch_size)
      for family in SSM_FAMILIES:
        dense = kinds if family in cpu_dense.FAMILIES else {"base": {}}
        for kind, options in dense.items():
          yield Case(f"{family}, {kind}, B {batch_size}", "decode", family, size,
                     {"dense": options})


def quick_cases(part: str) -> Iterator[Case]:
  """Yields the part's first case at a toy size."""
  case = next(cases(part))
  size = Size(16, 1 if part == "mixer" else 2, 64, case.size.batch_size, 64)
  yield dataclasses.replace(case, size=size)


def write_tree(revision: str, folder: str) -> str:
  """Writes the files of a revision of this repository into a folder; returns its full name.

  Raises:
    InputError: there is no repository, or no such revision in it.
  """
  git = ["git", "-C", str(common.ROOT)]
  found = subprocess.run(
      [*git, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"],
      capture_output=True, text=True, check=False,
  )
  if found.returncode:
    raise InputError(
        f"--before {revision!r} is not valid: expected a revision of the repository {common.ROOT}"
    )
  name = found.stdout.strip()
  with subprocess.Popen([*git, "archive", name], stdout=subprocess.PIPE) as archive:
    subprocess.run(["tar", "-x", "-C", folder], stdin=archive.stdout, check=True)
  return name


def _worker(tree: str) -> Worker:
  environment = os.environ | {"PYTHONPATH": tree}
  return Worker(sys.executable, SCRIPT, environment, option="this Python,",
                needs="a tree that has experiments/benchmarks/common.py with the same interface")


def _compare(before: Worker, now: Worker, case: Case, pairs: int) -> tuple[common.Compared, float]:
  """Times a case; returns the times, and the tokens of a step."""
  arguments = {"family": case.family, "size": list(dataclasses.astuple(case.size)),
               "options": case.options}
  for worker in (before, now):
    tokens = worker.ask(case.kind, "tokens", **arguments)["tokens"]
  times = common.compare(
      lambda: float(now.ask("step", "seconds")["seconds"]),
      lambda: float(before.ask("step", "seconds")["seconds"]), pairs,
  )
  return times, float(tokens)


def table(part: str, tree: str, *, quick: bool) -> Table:
  """Times the cases of a part in both trees, in two processes of their own."""
  rows = [["what", "tokens/s", "before", "ratio", "quartiles", "bar"]]
  results = {}
  before, now = _worker(tree), _worker(str(common.ROOT))
  try:
    chosen = list(quick_cases(part) if quick else cases(part))
    for case in common.progress(chosen, part):
      times, tokens = _compare(before, now, case, 1 if quick else PAIRS)
      lower, upper = times.quartiles
      results[f"{part}: {case.name}"] = common.figures(
          tokens_per_second=tokens / times.first, before=tokens / times.second,
          ratio=times.ratio, lower_quartile=lower, upper_quartile=upper, bar=BAR,
      )
      rows.append([case.name, common.number(tokens / times.first),
                   common.number(tokens / times.second), common.ratio(times.ratio),
                   times.middle(), common.bar(BAR)])
  finally:
    before.close()
    now.close()
  return Table(f"{part}, beside the older revision", rows, results)


def main(arguments: Sequence[str]) -> None:
  """Runs the parts; prints and records each table when it is done."""
  parser = common.parser(__doc__, "a toy case of each part")
  parser.add_argument("--before", required=True, metavar="REVISION",
                      help="the older revision of this repository")
  parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                      help=f"some of {', '.join(PARTS)} (all)")
  options = parser.parse_args(arguments)
  results: dict[str, dict[str, float]] = {}
  with tempfile.TemporaryDirectory() as folder:
    try:
      name = write_tree(options.before, folder)
      print(f"float32, {common.hardware()}; before: {name}\n", flush=True)
      for part in options.only:
        done = table(part, folder, quick=options.quick)
        print(done, flush=True)
        results |= done.results
        if options.json:
          common.write_json(options.json, common.record(
              "revisions", arguments, "tokens/s and ratios of speeds, now over before", results,
              before=name,
          ))
    except InputError as error:
      parser.error(str(error))


if __name__ == "__main__":
  main(sys.argv[1:])
