"""What dense hidden connections cost in training: time on this machine, and parameters.

Command   GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/benchmarks/dense_overhead.py \
              --json experiments/results/dense_overhead_DATE.json
Model     D 256, 6 layers, V 256 (the head is small, so that layers are what is measured),
          8 x 256 tokens, float32; all other options of a family as they are by default.
          Rows hold documents, as training packs them
Measured  a train step: forward, backward and AdamW. Base and dense steps alternate, one of
          each a repetition, so that what else the machine does hits both alike; times are
          medians over repetitions, the ratio is the median of the repetitions' ratios
Table 1   each family that has states: base, and dense with m = 2 and state injection
Table 2   one family: the base, and each dense option by itself, begun from m = 2
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from dense_jax import experiment, sharding
from dense_jax.config import ExperimentConfig
from dense_jax.files import write_atomically
from dense_jax.models.params import count_params
from dense_jax.models.registry import FAMILIES
from dense_jax.ops import dispatch
from dense_jax.training.step import Trainer
from dense_jax.types import Batch, InputError, Segments

VOCABULARY = 256
# Those with states that deeper layers can read.
SSM_FAMILIES = [name for name, family in FAMILIES.items() if family.form != "attention"]
DEPTH = 2
# Row -> what differs from dense.depth=2.
OPTIONS: dict[str, dict[str, object]] = {
    "default": {},
    "depth=1": {"depth": 1},
    "depth=4": {"depth": 4},
    "inject=inputs": {"inject": "inputs"},
    "depth=1 source=fused": {"depth": 1, "source": "fused"},
    "transition=linear": {"transition": "linear"},
    "transition=mlp": {"transition": "mlp"},
    "gate=none": {"gate": "none"},
    "gate=channel_state": {"gate": "channel_state"},
    "gate_sharing=per_source": {"gate_sharing": "per_source"},
    "fusion=concat": {"fusion": "concat"},
    "fusion=gated": {"fusion": "gated"},
    "fusion=attention": {"fusion": "attention"},
    "stride=2": {"stride": 2},
}
QUICK_OPTIONS = ("default", "inject=inputs", "depth=1 source=fused", "transition=mlp")


@dataclasses.dataclass(frozen=True)
class Size:
  """The model's and the batch's size, and how often a step is timed."""

  width: int
  layers: int
  batch_size: int
  time_steps: int
  repeats: int

  def __str__(self) -> str:
    return (f"D {self.width}, {self.layers} layers, {self.batch_size} x {self.time_steps} tokens, "
            f"{self.repeats} repetitions")


FULL = Size(width=256, layers=6, batch_size=8, time_steps=256, repeats=5)
QUICK = Size(width=64, layers=6, batch_size=2, time_steps=64, repeats=1)


@dataclasses.dataclass(frozen=True)
class Measured:
  """A dense model beside its base.

  Attributes:
    base, dense: median seconds of a train step.
    ratio: the median over repetitions of dense over base.
    low, high: the smallest and the largest of those.
    parameters: of the base.
    added: parameters that the dense connections add.
  """

  base: float
  dense: float
  ratio: float
  low: float
  high: float
  parameters: int
  added: int


def config(family: str, size: Size, **dense: object) -> ExperimentConfig:
  """The benchmark's model of a family.

  Raises:
    InputError: the family does not have these dense connections.
  """
  values = experiment.default_config(family)
  values.model.update(vocab_size=VOCABULARY, width=size.width, layers=size.layers)
  values.model.dense.update(dense)
  values.data.seq_len = size.time_steps
  values.train.update(batch_size=size.batch_size, steps=100)
  return experiment.resolve(values)


class Step:
  """A compiled train step with its state."""

  def __init__(self, settings: ExperimentConfig) -> None:
    trainer = Trainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
    rows, length = settings.train.batch_size, settings.data.seq_len
    # Any: host arrays stand where the dataclasses are annotated with jax's.
    tokens: Any = np.random.default_rng(0).integers(0, VOCABULARY, (rows, length + 1), np.int32)
    # Two documents a row.
    second = np.arange(length, dtype=np.int32) >= length // 2
    ids: Any = np.broadcast_to(1 + second.astype(np.int32), (rows, length))
    positions: Any = np.broadcast_to(
        np.arange(length, dtype=np.int32) - second * np.int32(length // 2), (rows, length)
    )
    mask: Any = np.ones((rows, length), bool)
    self._batch = trainer.put(
        Batch(tokens[:, :-1], tokens[:, 1:], mask, Segments(positions, ids))
    )
    self._state = trainer.init(0)
    self._train_step = trainer.train_step
    self.parameters = count_params(self._state.params)
    self()  # Compiles.

  def __call__(self) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    self._state, metrics = self._train_step(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - start


def compare(base: Step, dense: Step, repeats: int, done: Callable[[], object]) -> Measured:
  """Times both in turn, after one more step of each to warm up."""
  base(), dense()
  pairs = []
  for _ in range(repeats):
    pairs.append((base(), dense()))
    done()
  ratios = [d / b for b, d in pairs]
  return Measured(
      statistics.median(b for b, _ in pairs), statistics.median(d for _, d in pairs),
      statistics.median(ratios), min(ratios), max(ratios),
      base.parameters, dense.parameters - base.parameters,
  )


def cells(measured: Measured | None) -> list[str]:
  """A table's row without its first cell."""
  if measured is None:
    return ["", "", "refused", "", ""]
  return [
      f"{1e3 * measured.base:.0f}", f"{1e3 * measured.dense:.0f}", f"{measured.ratio:.2f}",
      f"{measured.low:.2f} to {measured.high:.2f}",
      f"{measured.added:,} ({100 * measured.added / measured.parameters:.1f}%)",
  ]


def markdown(first: str, rows: dict[str, Measured | None]) -> str:
  """A table of measurements; its header begins with `first`."""
  header = [first, "base, ms", "dense, ms", "time ratio", "its range", "parameters added"]
  lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
  lines += [[name, *cells(measured)] for name, measured in rows.items()]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def running(families: list[str]) -> str:
  """Which implementation runs, by the resolver."""
  chosen = {name: dispatch.resolve(FAMILIES[name].form, "auto") for name in families}
  # Rows hold documents, which a convolution cannot.
  parts = [f"{name} {'chunked' if form == 'conv' else form}" for name, form in chosen.items()]
  return f"implementations on {jax.default_backend()}: " + ", ".join(parts)


def hardware() -> str:
  """Cores and memory that this process has."""
  model = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.is_file():
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")]
    model = names[0] if names else model
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  return f"{len(os.sched_getaffinity(0))} cores of {model}, {memory:.0f} GiB"


def record(size: Size, results: dict[str, Any]) -> dict[str, Any]:
  """The figures and all that says how they came about."""
  names = ("jax", "jaxlib", "flax", "optax", "numpy")
  tunables = os.environ.get("GLIBC_TUNABLES")
  command = ["python", "experiments/benchmarks/dense_overhead.py", *sys.argv[1:]]
  return {
      "date": datetime.date.today().isoformat(),
      "hardware": hardware(),
      "python": platform.python_version(),
      "versions": {name: importlib.metadata.version(name) for name in names},
      "command": " ".join(([f"GLIBC_TUNABLES={tunables}"] if tunables else []) + command),
      "size": dataclasses.asdict(size),
      "note": "seconds of a train step; null: refused",
      "results": results,
  }


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--family", default="mamba2", choices=SSM_FAMILIES,
                      help="whose options the second table measures (mamba2)")
  parser.add_argument("--quick", action="store_true",
                      help="a tiny model, one family, few options, once: a smoke test")
  parser.add_argument("--json", default="", metavar="FILE", help="write the figures there")
  options = parser.parse_args()
  size = QUICK if options.quick else FULL
  families = [options.family] if options.quick else SSM_FAMILIES
  chosen = {name: OPTIONS[name] for name in (QUICK_OPTIONS if options.quick else OPTIONS)}
  print(running(families))
  print(f"{size}, float32, {hardware()}", flush=True)

  bar = tqdm.tqdm(total=(len(families) + len(chosen)) * size.repeats, unit="pair",
                  disable=not sys.stderr.isatty(), dynamic_ncols=True)

  def measure(name: str, base: Step, family: str, **dense: object) -> Measured | None:
    bar.set_description(name)
    try:
      step = Step(config(family, size, **{"depth": DEPTH, **dense}))
    except InputError:
      bar.update(size.repeats)
      return None
    return compare(base, step, size.repeats, bar.update)

  by_family = {}
  for name in families:
    bar.set_description(f"{name}: compiling")
    by_family[name] = measure(name, Step(config(name, size)), name)
  with bar.external_write_mode():
    print("\n" + markdown(f"family, m = {DEPTH}", by_family), flush=True)

  base = Step(config(options.family, size))
  by_option = {
      name: measure(name, base, options.family, **dense) for name, dense in chosen.items()
  }
  bar.close()
  print("\n" + markdown(f"{options.family}, m = {DEPTH} but for", by_option))
  if options.json:
    results = {
        "families": by_family, "options_family": options.family, "options": by_option,
    }
    plain = {
        key: value if isinstance(value, str) else {
            name: measured and dataclasses.asdict(measured) for name, measured in value.items()
        }
        for key, value in results.items()
    }
    text = json.dumps(record(size, plain), indent=2) + "\n"
    write_atomically(pathlib.Path(options.json), text.encode())


if __name__ == "__main__":
  main()
