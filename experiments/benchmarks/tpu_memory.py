r"""Memory that dense state connections cost, by the TPU v5e compiler; needs no TPU.

    TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost \
    JAX_PLATFORMS=cpu PYTHONPATH=.venv/tpu_compiler \
    python -m experiments.benchmarks.tpu_memory [--family mamba2 ...] [--json FILE]

Compiles the train step of `experiments/family_350m.py` for one chip, 4 sequences of 2048
tokens in bf16 with float32 AdamW, once as the base model and once with dense state
connections of depth 2, and prints the compiler's peak of HBM: arguments and temporaries
that are alive together. Beside it stands the sum of all arguments and temporaries, in which
the compiler also counts what its allocation leaves unused. Minutes a family.
"""

import argparse
import datetime
import json
import pathlib
import platform
import sys
from typing import Any

import jax
from jax.experimental import topologies
from tqdm import tqdm

from dense_jax import experiment, sharding
from dense_jax.ops import dispatch
from dense_jax.training.step import Trainer

FILE = pathlib.Path(__file__).parents[1] / "family_350m.py"
FAMILIES = ("mamba", "mamba2", "s4", "s4d", "retnet", "gau_retnet")
SEQUENCES = 4


def measure(family: str, depth: int) -> dict[str, float]:
  """GB of the compiled train step: `peak`, `arguments`, `temporaries`."""
  overrides = [
      ("model.dense.depth", str(depth)), ("train.batch_size", str(SEQUENCES)), ("mesh.data", "1")
  ]
  config = experiment.load(f"{FILE}:{family}", overrides)
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  mesh = sharding.make_mesh(config.mesh, list(topology.devices)[:1])
  with dispatch.compiling_for("tpu"):
    trainer = Trainer(config, mesh)
    batch = trainer.batch_shapes(SEQUENCES, config.data.seq_len)
    step: Any = trainer.train_step
    compiled = step.lower(trainer.state_shapes, batch).compile()
  memory = compiled.memory_analysis()
  sizes = {
      "peak": memory.peak_memory_in_bytes,
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
  }
  return {name: size / 1e9 for name, size in sizes.items()}


def main() -> None:
  """See the file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  args = parser.parse_args()
  rows = {}
  cases = [(family, depth) for family in args.family for depth in (0, 2)]
  for family, depth in (progress := tqdm(cases, desc="compiling")):
    progress.set_postfix_str(f"{family}, m = {depth}")
    rows[family, depth] = measure(family, depth)
  print("| family | base, peak GB | m = 2, peak GB | ratio | arguments + temporaries, ratio |")
  print("|---|---|---|---|---|")
  for family in args.family:
    base, dense = rows[family, 0], rows[family, 2]
    whole = [row["arguments"] + row["temporaries"] for row in (base, dense)]
    print(
        f"| {family} | {base['peak']:.2f} | {dense['peak']:.2f} | "
        f"{dense['peak'] / base['peak']:.2f} | {whole[1] / whole[0]:.2f} |"
    )
  if args.json:
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": "TPU v5e compiler, one chip; no TPU",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "command": " ".join(sys.argv),
        "gigabytes": [{"family": f, "depth": m, **row} for (f, m), row in rows.items()],
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
