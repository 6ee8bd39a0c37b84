"""Memory that dense state connections cost, by the TPU v5e compiler; needs no TPU.

    python experiments/benchmarks/tpu_memory.py [--family mamba2 ...] [--json FILE]

Compiles the train step of `experiments/family_350m.py` for one chip, 4 sequences of 2048
tokens in bf16 with float32 AdamW, once as the base model and once with dense state
connections of depth 2, and prints the compiler's peak of HBM: arguments and temporaries
that are alive together. Beside it stands the sum of all arguments and temporaries, in which
the compiler also counts what its allocation leaves unused. Minutes a family.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import platform
import sys

import jax
from tqdm import tqdm

from dense_jax import experiment
from dense_jax.cli.aot import compile_program

FILE = pathlib.Path(__file__).parents[1] / "family_350m.py"
FAMILIES = ("mamba", "mamba2", "s4", "s4d", "retnet", "gau_retnet")
SEQUENCES = 4


def measure(family: str, depth: int) -> dict[str, float]:
  """GB of the compiled train step: `peak`, `arguments`, `temporaries`."""
  overrides = [
      ("model.dense.depth", str(depth)), ("train.batch_size", str(SEQUENCES)), ("mesh.data", "1")
  ]
  config = experiment.load(f"{FILE}:{family}", overrides)
  memory = dataclasses.asdict(compile_program(config, "v5e:1x1").memory)
  if memory["arguments"] is None:
    sys.exit(f"{family}, m = {depth}: the compiler refuses {memory['peak'] / 1e9:.2f} GB")
  return {name: memory[name] / 1e9 for name in ("peak", "arguments", "temporaries")}


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
