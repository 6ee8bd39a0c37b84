r"""Prices of models in time and memory, by the compilers for GPUs and TPUs; needs no such chip.

    python -m experiments.benchmarks.prices [--target h100 v5e ...] [--family mamba2 ...] \
        [--only base ...] [--set model.layers=10 ...] [--decode 1 6 64] [--json FILE]
    python -m experiments.benchmarks.prices --target h100 --family mamba2 --only base --largest 20

Compiles the train step of `experiments/family_350m.py` for one chip, in bf16 with float32 AdamW,
sequences of 2048 tokens: 16 of them with `remat=minimal` on GPUs, 4 with `remat=full` on TPUs. A
case takes minutes; FILE is written after each, and cases that it has are not compiled again.
Targets are kinds of chips (GPUs need `make gpu-compiler`). Other keys of the configuration are
given with --set, in place of a cheaper or another model.

Table 1   bytes a token and layer, the time of the matmuls and of the bytes, kernel launches, the
          price, its ratio to the base model's, and the bar. The price of a GPU is an estimate: the
          sum of both times at measured rates. That of a TPU is a bound: the larger of both at
          published peaks
          With --decode 1 6 64, the step of decoding that many rows in place of the train step:
          the bytes it moves over those of the weights in bf16 and of the states
Table 2   peak memory and FLOPs of a chip, and their ratios to the base model's
--largest the N instructions, and lines of code, that move the most bytes, of each case. With
          `remat=full`, jax names the line of the layers' loop for all of the backward pass:
          `--set model.remat=minimal` tells more there
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dense_jax import experiment
from dense_jax.config import ModelConfig
from dense_jax.costs.chips import CHIPS
from dense_jax.formatting import markdown_table
from dense_jax.models.registry import FAMILIES
from experiments.benchmarks import common, cpu_dense

FILE = "experiments/family_350m.py"
KINDS: Mapping[str, Mapping[str, str]] = {
    "base": {},
    "state m=1": {"depth": "1"},
    "state m=2": {"depth": "2"},
    "inputs m=1": {"depth": "1", "inject": "inputs"},
}
LENGTH = 2048
# Is the target a GPU -> rows of the batch, remat.
BATCHES = {True: (16, "minimal"), False: (4, "full")}
# Greatest prices of base models on an H100 in ms, and launches of mamba's.
H100_BARS = {"mamba2": 195, "gau_retnet": 200, "retnet": 210, "mamba": 260}
LAUNCHES = {"mamba": 20_000}
# Greatest ratios of a dense model's price to its base's: on GPUs; on TPUs.
GPU_RATIOS = {"state m=1": 1.15, "state m=2": 1.30, "inputs m=1": 1.06}
TPU_RATIOS = {"state m=1": 1.15, "state m=2": 1.25}
# On TPUs, the greatest ratio of HBM to matmuls of a base model; and mamba's own bar for m=2.
HBM_OVER_MATMULS = {"mamba2": 1.0, "gau_retnet": 1.0, "retnet": 1.0, "mamba": 1.1}
MAMBA_TPU_RATIO = 1.35
# Greatest ratios of peak memory and FLOPs to the base's, with 4 x 2048 tokens on one v5e.
WORK_BARS = {"state m=1": (1.08, 1.13), "state m=2": (1.18, 1.25), "inputs m=1": (None, 1.05)}
BARRED = ("mamba2", "retnet")
# Greatest ratio of the bytes of a step of decoding to those of bf16 weights and states.
DECODE_BAR = 1.3


@dataclasses.dataclass(frozen=True)
class Cell:
  """A model on a chip."""

  target: str
  family: str
  kind: str
  overrides: tuple[str, ...] = ()
  decode: int = 0  # Rows of a step of decoding; 0 means a train step.

  @property
  def name(self) -> str:
    """The cell's name in results, such as "h100 | mamba2 | state m=2 | model.layers=10"."""
    return " | ".join(self._parts())

  @property
  def label(self) -> str:
    """The cell's name in tables, whose columns "|" would end."""
    return ", ".join(self._parts())

  def _parts(self) -> tuple[str, ...]:
    program = (f"decode B {self.decode}",) if self.decode else ()
    return (self.target, self.family, self.kind, *program, *self.overrides)

  def command(self) -> list[str]:
    """Returns the command that compiles it."""
    chip = CHIPS[self.target]
    rows, remat = BATCHES[chip.is_gpu]
    shape = "x".join("1" * chip.axes)
    settings = {
        **{f"model.dense.{key}": value for key, value in KINDS[self.kind].items()},
        "train.batch_size": str(self.decode or rows), "data.seq_len": str(LENGTH),
        "model.remat": remat, "mesh.data": "1",
        **dict(each.split("=", 1) for each in self.overrides),
    }
    return [
        sys.executable, "-m", "dense_jax.cli.compile", "--config", f"{FILE}:{self.family}",
        "--topology", f"{self.target}:{shape}", "--program", "decode" if self.decode else "train",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def measure(cell: Cell, largest: int = 0) -> dict[str, Any] | None:
  """Compiles a cell in a process of its own; returns the compiler's report.

  None means that there is none, for a reason that is printed: for example, the family has no such
  connections. With `largest`, that many instructions and lines of code are printed.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "report.json"
    done = subprocess.run(
        [*cell.command(), "--json", str(file), *(["--largest", str(largest)] if largest else [])],
        cwd=common.ROOT, capture_output=True, text=True, check=False,
    )
    if not file.is_file():
      print(f"{cell.name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
      return None
    if largest:
      print(f"{cell.name}\n\n{done.stdout}", flush=True)
    return json.loads(file.read_text())


@dataclasses.dataclass(frozen=True)
class Price:
  """The times of a compiled train step, in seconds, and its launches.

  Attributes:
    matmuls, memory: by measured rates for a GPU, by published peaks for a TPU.
    seconds: the sum for a GPU (an estimate), the larger one for a TPU (a bound).
    launches: kernels that run.
  """

  matmuls: float
  memory: float
  seconds: float
  launches: float


def price(report: Mapping[str, Any]) -> Price:
  """Returns the price of a compiled train step."""
  if report["estimate"]:
    matmuls, memory = report["estimate"]["matmuls"], report["estimate"]["memory"]
    return Price(matmuls, memory, matmuls + memory, report["launches"])
  matmuls, memory = report["bound"]["compute"], report["bound"]["memory"]
  return Price(matmuls, memory, max(matmuls, memory), report["launches"])


def bar(cell: Cell, found: Price, base: Price | None) -> str:
  """Returns what a cell must reach and whether it does, such as "<= 195 ms: no"; "" if nothing."""
  parts: list[tuple[float, float, str]] = []
  ratio = found.seconds / base.seconds if base else None
  gpu = CHIPS[cell.target].is_gpu
  if cell.kind != "base":
    limits = dict(GPU_RATIOS if gpu else TPU_RATIOS)
    if cell.family == "mamba" and not gpu:
      limits = {"state m=2": MAMBA_TPU_RATIO}
    if ratio and cell.kind in limits:
      parts.append((ratio, limits[cell.kind], " of base"))
  elif not cell.overrides and cell.target == "h100":
    if cell.family in H100_BARS:
      parts.append((1e3 * found.seconds, H100_BARS[cell.family], " ms"))
    if cell.family in LAUNCHES:
      parts.append((found.launches, LAUNCHES[cell.family], " launches"))
  elif not cell.overrides and cell.target == "v5e" and cell.family in HBM_OVER_MATMULS:
    parts.append((found.memory / found.matmuls, HBM_OVER_MATMULS[cell.family], " HBM / matmuls"))
  return "; ".join(
      f"<= {limit:g}{unit}: {'yes' if value <= limit else 'no'}" for value, limit, unit in parts
  )


def _layers(report: Mapping[str, Any]) -> int:
  return report["config"]["model"]["layers"]


def _base(cell: Cell, results: Mapping[str, Any]) -> Mapping[str, Any] | None:
  return results.get(dataclasses.replace(cell, kind="base").name)


def prices(cells: Sequence[Cell], results: Mapping[str, Any]) -> list[list[str]]:
  """Makes table 1."""
  rows = [["chip, family, model", "KB a token and layer", "matmuls, ms", "HBM, ms", "launches",
           "price, ms", "over base", "bar"]]
  for cell in cells:
    report, base = results.get(cell.name), _base(cell, results)
    if not report or not report["bound"]:
      continue
    found = price(report)
    other = price(base) if base and base["bound"] else None
    tokens = report["config"]["train"]["batch_size"] * report["config"]["data"]["seq_len"]
    rows.append([
        cell.label, f"{report['bytes_accessed'] / tokens / _layers(report) / 1e3:.0f}",
        f"{1e3 * found.matmuls:.0f}", f"{1e3 * found.memory:.0f}",
        f"{found.launches:,.0f}" if CHIPS[cell.target].is_gpu else "", f"{1e3 * found.seconds:.0f}",
        common.ratio(found.seconds / other.seconds if other else None), bar(cell, found, other),
    ])
  return rows


def decoding(cells: Sequence[Cell], results: Mapping[str, Any]) -> list[list[str]]:
  """Makes table 1 of steps of decoding."""
  rows = [["chip, family, model", "weights, MB", "states, MB", "moved, MB", "over both", "bar",
           "launches", "price, ms", "over base"]]
  for cell in cells:
    report, base = results.get(cell.name), _base(cell, results)
    if not report or not report["bound"]:
      continue
    weights, states = least_bytes(cell, report)
    ratio = report["bytes_accessed"] / (weights + states)
    found = price(report)
    rows.append([
        cell.label, f"{weights / 1e6:.0f}", f"{states / 1e6:.0f}",
        f"{report['bytes_accessed'] / 1e6:.0f}", f"{ratio:.2f}",
        f"<= {DECODE_BAR:g}: {'yes' if ratio <= DECODE_BAR else 'no'}", f"{found.launches:,.0f}",
        f"{1e3 * found.seconds:.2f}",
        common.ratio(found.seconds / price(base).seconds if base and base["bound"] else None),
    ])
  return rows


def least_bytes(cell: Cell, report: Mapping[str, Any]) -> tuple[float, float]:
  """Returns the bytes that a step of decoding must move: of the weights in bf16, of the states.

  States are read and written once, and read once by each layer that reads another's.
  """
  moved = cpu_dense.step_bytes(_model(cell, report["config"]["model"]), cell.decode)
  return moved.weights / 2, 2 * moved.states + moved.shallow


def _model(cell: Cell, values: Mapping[str, Any]) -> ModelConfig:
  """Returns the configuration of a cell's model, of which `values` are the report's."""
  overrides = [
      (f"model.{key}", str(values[key])) for key in ("vocab_size", "width", "layers", "dtype")
  ]
  overrides += [(f"model.dense.{key}", value) for key, value in KINDS[cell.kind].items()]
  return experiment.load(str(common.ROOT / f"{FILE}:{cell.family}"), overrides).model


def work(cells: Sequence[Cell], results: Mapping[str, Any]) -> list[list[str]]:
  """Makes table 2."""
  rows = [["chip, family, model", "peak memory, GB", "over base", "bar", "TFLOP", "over base",
           "bar", "compiled in, s"]]
  for cell in cells:
    report, base = results.get(cell.name), _base(cell, results)
    if not report:
      continue
    barred = cell.target == "v5e" and (cell.family in BARRED or cell.kind.startswith("inputs"))
    limits = WORK_BARS.get(cell.kind, (None, None)) if barred else (None, None)
    peak, flops = report["hbm"]["peak"], report["flops"]
    rows.append([
        cell.label, f"{peak / 1e9:.2f}",
        f"{peak / base['hbm']['peak']:.3f}" if base else "", _limit(limits[0]),
        f"{flops / 1e12:.1f}" if flops else "refused",
        f"{flops / base['flops']:.3f}" if flops and base and base["flops"] else "",
        _limit(limits[1]), f"{report['compile_seconds']:.0f}",
    ])
  return rows


def _limit(greatest: float | None) -> str:
  return f"<= {greatest:g}" if greatest else ""


def main(arguments: Sequence[str]) -> None:
  """Compiles the cells and prints the tables."""
  command = common.parser(__doc__)
  command.add_argument("--target", nargs="+", choices=CHIPS, default=["h100", "v5e"])
  command.add_argument("--family", nargs="+", choices=FAMILIES,
                       default=common.SSM_FAMILIES, help="(all with states)")
  command.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
  command.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                       help="other keys of the configuration, such as model.layers=10")
  command.add_argument("--decode", nargs="+", type=int, default=[0], metavar="B",
                       help="steps of decoding of B rows, in place of train steps")
  command.add_argument("--largest", type=int, default=0, metavar="N",
                       help="also the N instructions and lines that move the most bytes")
  options = command.parse_args(arguments)
  results: dict[str, Any] = {}
  if options.json and pathlib.Path(options.json).is_file():
    results = json.loads(pathlib.Path(options.json).read_text())["results"]
  cells = [
      Cell(target, family, kind, tuple(options.set), rows)
      for target in options.target for family in options.family for rows in options.decode
      for kind in options.only
  ]
  for cell in (progress := tqdm(cells, desc="compiling", disable=common.quiet())):
    progress.set_postfix_str(cell.name)
    if cell.name in results and not options.largest:
      continue
    results[cell.name] = measure(cell, options.largest)
    if options.json:
      note = "the report of dense_jax.cli.compile; null: the family has no such connections"
      common.write_json(options.json, common.record("prices", arguments, note, results))
  print(markdown_table((decoding if any(options.decode) else prices)(cells, results)))
  print("\n" + markdown_table(work(cells, results)))


if __name__ == "__main__":
  main(sys.argv[1:])
