"""Seconds to trace and to compile the train step of 12 and of 48 layers, on a CPU.

Command   python -m experiments.benchmarks.compile_time \
              --json experiments/results/compile_time_DATE.json
Measured  both depths scan the same super-block of two layers, so that their times should be nearly
          equal: the ratio should be at most 1.5. Each compilation runs in a new process, without
          a cache. Of the repetitions the fastest counts, because disturbances only add time. On a
          machine that does other work too, the processor time and its ratio say more
Cases     mamba2 and gau_retnet, base and dense with m = 2 and state injection; D 256, 2 x 512
          tokens, float32
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from dense_jax import sharding
from dense_jax.training.step import Trainer
from experiments.benchmarks import common
from experiments.benchmarks.common import Size, Table

BLOCK_LAYERS = 2
BAR = 1.5


@dataclasses.dataclass(frozen=True)
class Case:
  """A model to compile."""

  family: str
  depth: int
  layers: int
  width: int
  time_steps: int

  def name(self) -> str:
    """Returns the family and the depth of its connections, without the number of layers."""
    return f"{self.family} m = {self.depth}" if self.depth else f"{self.family} base"


def seconds(case: Case) -> dict[str, float]:
  """Measures the seconds to trace (lowering included) and to compile, in this process.

  "cpu" is the processor time of both, of all threads.
  """
  settings = common.config(
      case.family, Size(case.width, case.layers, 256, 2, case.time_steps),
      dense={"depth": case.depth}, block_layers=BLOCK_LAYERS,
  )
  trainer = Trainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
  batch = trainer.batch_shapes(settings.train.batch_size, settings.data.seq_len)
  step: Any = trainer.train_step
  start, cpu = time.perf_counter(), time.process_time()
  lowered = step.lower(trainer.state_shapes, batch)
  traced = time.perf_counter()
  lowered.compile()
  return {
      "trace": traced - start, "compile": time.perf_counter() - traced,
      "cpu": time.process_time() - cpu,
  }


def measure(case: Case, repeats: int) -> dict[str, float]:
  """Measures a case in `repeats` new processes; returns the fastest times."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
  command = [sys.executable, "-m", "experiments.benchmarks.compile_time", "--case",
             json.dumps(dataclasses.asdict(case))]
  runs = []
  for _ in range(repeats):
    done = subprocess.run(
        command, cwd=common.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    runs.append(json.loads(done.stdout.splitlines()[-1]))
  return {part: min(run[part] for run in runs) for part in runs[0]}


def main(arguments: Sequence[str]) -> None:
  """Runs the benchmark and prints the table."""
  parser = common.parser(__doc__, "two small models of one family, once")
  parser.add_argument("--case", help="used by the benchmark itself: compile this one, here")
  options = parser.parse_args(arguments)
  if options.case:
    print(json.dumps(seconds(Case(**json.loads(options.case)))))
    return
  families, depths = (("mamba2",), (0,)) if options.quick else (("mamba2", "gau_retnet"), (0, 2))
  few, many = layers = (4, 8) if options.quick else (12, 48)
  width, length = (32, 64) if options.quick else (256, 512)
  cases = [Case(family, depth, count, width, length)
           for family in families for depth in depths for count in layers]
  found = {case: measure(case, 1 if options.quick else 2)
           for case in common.progress(cases, "compiling")}

  rows = [["model", f"{few} layers, s", f"{many} layers, s", "ratio", "bar",
           f"trace, {few} and {many}, s", f"compile, {few} and {many}, s",
           f"processor time, {few} and {many}, s", "its ratio"]]
  results = {}
  for case in cases[::2]:
    pair = [found[dataclasses.replace(case, layers=count)] for count in layers]
    totals = [each["trace"] + each["compile"] for each in pair]
    ratio = totals[1] / totals[0]
    cpu_ratio = pair[1]["cpu"] / pair[0]["cpu"]
    results[case.name()] = {
        **{f"{part} {count}": each[part] for count, each in zip(layers, pair, strict=True)
           for part in each},
        "ratio": ratio, "cpu_ratio": cpu_ratio, "bar": BAR,
    }
    rows.append([case.name(), *(f"{total:.1f}" for total in totals), common.ratio(ratio),
                 f"<= {BAR:g}",
                 *(" and ".join(f"{each[part]:.1f}" for each in pair)
                   for part in ("trace", "compile", "cpu")),
                 common.ratio(cpu_ratio)])
  print(f"{common.hardware()}\n")
  print(Table("Trace and compilation of a train step", rows, results))
  if options.json:
    common.write_json(options.json, common.record(
        "compile_time", arguments, "seconds; trace includes lowering, cpu is both", results
    ))


if __name__ == "__main__":
  main(sys.argv[1:])
