r"""A table of models that fit TPU slices, according to the TPU compiler; needs no TPU.

    python -m experiments.benchmarks.tpu_matrix [--only TEXT ...] [--json FILE] [--markdown FILE]

Compiles the train step of each model, base and dense, for each topology with a suitable mesh, and
writes the table that is kept in `experiments/results/tpu_compile.md`. A case takes minutes; FILE
is written after each, and cases that it already has are not compiled again.

MFU at most   the MFU (FLOPs by `models/flops.py` over the chip's peak) of a step that takes no
              longer than its largest lower bound: matmuls at peak, HBM traffic at full bandwidth,
              collectives at the links' bandwidth. It is an upper bound, not an estimate
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dense_jax import experiment
from dense_jax.config import ExperimentConfig, MeshConfig
from dense_jax.costs.chips import CHIPS
from dense_jax.formatting import markdown_table
from dense_jax.models.flops import train_flops
from dense_jax.runs.compile import compile_program
from experiments.benchmarks import common

JSON = common.ROOT / "experiments" / "results" / "tpu_compile.json"
MARKDOWN = JSON.with_suffix(".md")
BASE, STATE = ("model.dense.depth", "0"), ("model.dense.depth", "1")
# Name -> experiment and overrides.
MODELS: Mapping[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "retnet 350M": ("dense_retnet_350m.py", (BASE,)),
    "dense_retnet 350M": ("dense_retnet_350m.py", ()),
    "mamba 370M": ("dense_mamba_370m.py", (BASE,)),
    "dense_mamba 370M": ("dense_mamba_370m.py", ()),
    "mamba2 370M": ("family_350m.py:mamba2", (BASE,)),
    "dense_mamba2 370M": ("family_350m.py:mamba2", (STATE,)),
    "retnet 1.3B": ("dense_retnet_1p3b.py", (BASE,)),
    "dense_retnet 1.3B": ("dense_retnet_1p3b.py", ()),
    "mamba 1.4B": ("family_1p3b.py:mamba", (BASE,)),
    "dense_mamba 1.4B": ("family_1p3b.py:mamba", (STATE,)),
    "mamba2 1.3B": ("family_1p3b.py:mamba2", (BASE,)),
    "dense_mamba2 1.3B": ("family_1p3b.py:mamba2", (STATE,)),
}
# Topology -> the mesh: parameters are split over chips that are near each other.
TOPOLOGIES: Mapping[str, MeshConfig] = {
    "v4:2x2x2": MeshConfig(data=1, fsdp=8),
    "v5e:4x4": MeshConfig(data=1, fsdp=16),
    "v5e:16x16": MeshConfig(data=16, fsdp=16),
    "v5p:4x4x4": MeshConfig(data=4, fsdp=16),
    "v6e:8x8": MeshConfig(data=4, fsdp=16),
}
LENGTH = 2048
LONG = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
  """A model on a slice."""

  model: str
  topology: str
  mesh: MeshConfig
  rows: int
  length: int

  @property
  def name(self) -> str:
    """The case's name, such as `mamba2 370M | v5e:4x4 | fsdp 16 | 64 x 2048`."""
    sizes = dataclasses.asdict(self.mesh)
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    return f"{self.model} | {self.topology} | {mesh} | {self.rows} x {self.length}"

  def config(self) -> ExperimentConfig:
    """Returns the experiment's configuration, with the case's mesh and batch."""
    spec, overrides = MODELS[self.model]
    batch = [("train.batch_size", str(self.rows)), ("data.seq_len", str(self.length))]
    config = experiment.load(str(JSON.parents[1] / spec), [*overrides, *batch])
    return dataclasses.replace(config, mesh=self.mesh)


def cases() -> Iterator[Case]:
  """Yields all models with one sequence per chip at 1.3B and four at 350M; then special cases."""
  for topology, mesh in TOPOLOGIES.items():
    for model in MODELS:
      rows = mesh.data * mesh.fsdp * (1 if model.endswith("B") else 4)
      yield Case(model, topology, mesh, rows, LENGTH)
  # Heads split over neighbouring chips, and a sequence of 2^20 tokens split over all chips.
  yield Case("dense_mamba2 1.3B", "v5p:4x4x4", MeshConfig(data=2, fsdp=8, tensor=4), 64, LENGTH)
  yield Case("dense_mamba2 1.3B", "v5p:4x4x4", MeshConfig(data=1, sequence=64), 1, LONG)


def measure(case: Case) -> dict[str, Any]:
  """Compiles a case; returns the compiler's report and the bound on MFU."""
  config = case.config()
  report = compile_program(config, case.topology)
  ceiling = None
  if report.bound:
    chip = CHIPS[case.topology.partition(":")[0]]
    tokens = case.rows * case.length / report.chips
    ceiling = train_flops(config.model, case.length) * tokens / chip.flops / report.bound.seconds
  return report.as_dict() | {"mfu_ceiling": ceiling}


def table(results: Mapping[str, Any]) -> list[list[str]]:
  """Makes the table, with one row for each case."""
  rows = [["model", "slice", "mesh", "batch", "fits", "HBM peak of capacity, GB", "matmul TFLOP",
           "HBM traffic, GB", "collectives, GB", "bound by", "MFU at most"]]
  for name, found in results.items():
    memory, bound = found["hbm"], found["bound"]
    cells = ["", "", "", "refused by the compiler", ""]
    if bound:
      moved = ", ".join(f"{c['kind']} {c['bytes'] / 1e9:.2f}" for c in found["collectives"])
      cells = [f"{found['matmul_flops'] / 1e12:.1f}", f"{found['bytes_accessed'] / 1e9:.0f}", moved,
               max(bound, key=bound.get), f"{found['mfu_ceiling']:.0%}"]
    rows.append([
        *name.split(" | "), "yes" if found["fits"] else "no",
        f"{memory['peak'] / 1e9:.2f} of {memory['capacity'] / 1e9:.0f}", *cells,
    ])
  return rows


def page(results: Mapping[str, Any], command: str) -> str:
  """Formats the table as a Markdown file."""
  versions = next(iter(results.values()))["versions"]
  said = ", ".join(f"{name} {version}" for name, version in versions.items())
  missing = len(list(cases())) - len(results)
  rest = f"\n\n{missing} more cases are not compiled yet; the command goes on with them."
  return (
      "# What fits which TPU slice\n\n"
      f"Made by `{command}` ({said}), without a TPU: the compiler's word on memory and work of a "
      "train step, a chip, loops counted by their trips; bf16, AdamW in float32. `bound by` and "
      "`MFU at most` follow from published peaks: no run is faster, and no time is claimed."
      f"{rest if missing else ''}\n\n{markdown_table(table(results))}\n"
  )


def main(arguments: Sequence[str]) -> None:
  """Compiles the cases, writes the results and prints the table."""
  command = common.parser(__doc__)
  command.set_defaults(json=str(JSON))
  command.add_argument("--markdown", default=str(MARKDOWN), metavar="FILE", help="the table")
  command.add_argument("--only", nargs="+", default=[""], metavar="TEXT",
                       help="cases whose names have one of these in them (all)")
  options = command.parse_args(arguments)
  results: dict[str, Any] = {}
  if pathlib.Path(options.json).is_file():
    results = json.loads(pathlib.Path(options.json).read_text())["results"]
  chosen = [case for case in cases() if any(text in case.name for text in options.only)]
  for case in (bar := tqdm(chosen, desc="compiling", disable=common.quiet())):
    bar.set_postfix_str(case.name)
    if case.name in results:
      continue
    results[case.name] = measure(case)
    order = [each.name for each in cases()]
    results = dict(sorted(results.items(), key=lambda item: order.index(item[0])))
    note = "reports of dense_jax.cli.compile, and the share of the peak that no run exceeds"
    record = common.record("tpu_matrix", arguments, note, results)
    common.write_json(options.json, record)
    text = page(results, "python -m experiments.benchmarks.tpu_matrix")
    pathlib.Path(options.markdown).write_text(text)
  print(markdown_table(table({case.name: results[case.name] for case in chosen})))


if __name__ == "__main__":
  main(sys.argv[1:])
