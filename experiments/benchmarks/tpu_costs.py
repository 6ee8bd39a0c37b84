r"""Memory and work of all families' train steps according to the TPU v5e compiler; needs no TPU.

    python -m experiments.benchmarks.tpu_costs [--family mamba2 ...] [--only base ...] \
        [--implementation pallas] --json FILE

Compiles the train step of `experiments/family_350m.py` for one chip, with 4 sequences of 2048
tokens, in bf16 with float32 AdamW: the base model, and dense connections with state injection
(m = 1, 2) and with input injection (m = 1). A case takes minutes; FILE is written after each, and
cases that it already has are not compiled again.

Table 1   peak HBM and FLOPs of a chip, with loops counted as often as they run, over the base's
Table 2   FLOPs and HBM bytes per token, and which published peak of a chip bounds the step. The
          HBM traffic is that of the v5e program; the times are lower bounds, not estimates
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dense_jax import experiment
from dense_jax.costs.chips import CHIPS
from dense_jax.errors import InputError
from dense_jax.runs.compile import compile_program
from experiments.benchmarks import common

FILE = common.ROOT / "experiments" / "family_350m.py"
SEQUENCES, LENGTH = 4, 2048
KINDS: Mapping[str, Mapping[str, object]] = {
    "base": {},
    "state m=1": {"depth": 1},
    "state m=2": {"depth": 2},
    "inputs m=1": {"depth": 1, "inject": "inputs"},
}
ROOFLINES = ("v5e", "v5p", "h200")
# Greatest ratios of HBM and FLOPs that dense may have over base; those of state injection apply
# to the families in BARRED.
BARS = {"state m=1": (1.08, 1.13), "state m=2": (1.18, 1.25), "inputs m=1": (None, 1.05)}
BARRED = ("mamba2", "retnet")


def measure(family: str, kind: str, implementation: str) -> dict[str, Any] | None:
  """Compiles a case; returns the compiler's report.

  None means that the family has no such connections or implementation; the reason is printed.
  """
  overrides = [("model.implementation", implementation)]
  overrides += [(f"model.dense.{key}", str(value)) for key, value in KINDS[kind].items()]
  overrides += [("train.batch_size", str(SEQUENCES)), ("mesh.data", "1")]
  try:
    config = experiment.load(f"{FILE}:{family}", overrides)
    report = compile_program(config, "v5e:1x1")
  except InputError as error:
    print(f"{family}, {kind}: {error}", file=sys.stderr)
    return None
  return report.as_dict()


def ratios(results: Mapping[str, Any]) -> list[list[str]]:
  """Makes table 1."""
  rows = [["family, 4 x 2048 on one v5e", "peak HBM, GB", "over base", "bar", "TFLOP", "over base",
           "bar", "compiled in, s"]]
  for name, found in results.items():
    family, kind = name.split(": ")
    base = results.get(f"{family}: base")
    if not found or not base:
      continue
    memory = found["hbm"]["peak"], base["hbm"]["peak"]
    work = found["flops"] or float("nan"), base["flops"] or float("nan")
    barred = family.split(" ")[0] in BARRED or kind.startswith("inputs")
    limits = BARS.get(kind, (None, None)) if barred else (None, None)
    bars = [f"<= {bar}" if bar else "" for bar in limits]
    rows.append([
        name, f"{memory[0] / 1e9:.2f}", f"{memory[0] / memory[1]:.3f}", bars[0],
        f"{work[0] / 1e12:.1f}", f"{work[0] / work[1]:.3f}", bars[1],
        f"{found['compile_seconds']:.0f}",
    ])
  return rows


def rooflines(results: Mapping[str, Any]) -> list[list[str]]:
  """Makes table 2."""
  rows = [["family", "GFLOP a token", "of them matmuls", "MB a token", "FLOP a byte",
           *(f"{chip}: bound by, matmuls / HBM, ms" for chip in ROOFLINES)]]
  tokens = SEQUENCES * LENGTH
  for name, found in results.items():
    if not found or not found["flops"]:
      continue
    matmuls, moved = found["matmul_flops"], found["bytes_accessed"]
    cells = []
    for chip in (CHIPS[name] for name in ROOFLINES):
      compute, memory = matmuls / chip.flops, moved / chip.memory_bandwidth
      binding = "matmuls" if compute >= memory else "HBM"
      cells.append(f"{binding}, {1e3 * compute:.0f} / {1e3 * memory:.0f}")
    rows.append([
        name, f"{found['flops'] / tokens / 1e9:.2f}", f"{matmuls / found['flops']:.0%}",
        f"{moved / tokens / 1e6:.1f}", f"{matmuls / moved:.0f}", *cells,
    ])
  return rows


def main(arguments: Sequence[str]) -> None:
  """Compiles the cases and prints the tables."""
  command = common.parser(__doc__)
  command.add_argument("--family", nargs="+", choices=common.SSM_FAMILIES,
                       default=common.SSM_FAMILIES)
  command.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
  command.add_argument("--implementation", default="auto", help="of the recurrences (auto)")
  options = command.parse_args(arguments)
  results: dict[str, Any] = {}
  if options.json and pathlib.Path(options.json).is_file():
    results = json.loads(pathlib.Path(options.json).read_text())["results"]
  how = options.implementation
  marked = "" if how == "auto" else f" ({how})"
  cases = [(family, kind) for family in options.family for kind in options.only]
  for family, kind in (bar := tqdm(cases, desc="compiling", disable=common.quiet())):
    name = f"{family}{marked}: {kind}"
    bar.set_postfix_str(name)
    if name in results:
      continue
    results[name] = measure(family, kind, how)
    if options.json:
      note = "the report of dense_jax.cli.compile; null: the family has no such connections"
      common.write_json(options.json, common.record("tpu_costs", arguments, note, results))
  print(common.markdown(ratios(results)))
  print("\n" + common.markdown(rooflines(results)))


if __name__ == "__main__":
  main(sys.argv[1:])
