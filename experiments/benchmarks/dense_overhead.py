"""The cost of dense hidden connections in training: time on this machine, and parameters.

Command   GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.benchmarks.dense_overhead \
              --json experiments/results/dense_overhead_DATE.json
Model     D 256, 6 layers, V 256 (a small head, so that the layers dominate), 8 x 256 tokens,
          float32; all other options of a family have their defaults. Rows hold several documents,
          as in training
Measured  a train step: forward, backward and AdamW. Base and dense steps alternate, so that
          disturbances of the machine affect both alike. Times are medians over repetitions, the
          ratio is the median of the repetitions' ratios
Table 1   each family that has states: base, and dense with m = 2 and state injection
Table 2   one family: base, and dense with m = 2 and one other option changed at a time
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tqdm

from dense_jax.errors import InputError
from dense_jax.formatting import markdown_table
from dense_jax.models.registry import FAMILIES
from dense_jax.ops import resolver
from experiments.benchmarks import common
from experiments.benchmarks.common import SSM_FAMILIES, Size, TrainStep

DEPTH = 2
# Per row.
DOCUMENTS = 2
# Name of a row -> options of config.model.dense that differ from depth=2.
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
QUICK_OPTIONS = ("inject=inputs",)

FULL = Size(width=256, layers=6, vocabulary=256, batch_size=8, time_steps=256)
QUICK = Size(width=64, layers=3, vocabulary=256, batch_size=2, time_steps=64)


@dataclasses.dataclass(frozen=True)
class Measured:
  """A dense model compared with its base.

  Attributes:
    seconds: of a train step, base first.
    parameters: the number of the base's parameters.
    added: the number of parameters that the dense connections add.
  """

  seconds: common.Compared
  parameters: int
  added: int

  def figures(self) -> dict[str, float]:
    """Returns the figures for the record."""
    seconds = self.seconds
    return {
        "base": seconds.first, "dense": seconds.second, "ratio": seconds.ratio,
        "low": seconds.low, "high": seconds.high,
        "parameters": self.parameters, "added": self.added,
    }


def compare(
    base: TrainStep, dense: TrainStep, repeats: int, done: Callable[[], object]
) -> Measured:
  """Times both steps in turn."""
  seconds = common.compare(base, dense, repeats, done)
  return Measured(seconds, base.parameters, dense.parameters - base.parameters)


def cells(measured: Measured | None) -> list[str]:
  """Formats a row of the table, without its first cell; None means that the case was refused."""
  if measured is None:
    return ["", "", "refused", "", ""]
  seconds = measured.seconds
  return [
      f"{1e3 * seconds.first:.0f}", f"{1e3 * seconds.second:.0f}", f"{seconds.ratio:.2f}",
      seconds.range(),
      f"{measured.added:,} ({100 * measured.added / measured.parameters:.1f}%)",
  ]


def markdown(first: str, rows: dict[str, Measured | None]) -> str:
  """Formats a table of measurements, whose header begins with `first`."""
  header = [first, "base, ms", "dense, ms", "time ratio", "its range", "parameters added"]
  return markdown_table([header, *([name, *cells(measured)] for name, measured in rows.items())])


def running(families: Sequence[str]) -> str:
  """Describes which implementation of each family runs here."""
  chosen = {name: resolver.resolve(FAMILIES[name].form, "auto") for name in families}
  # Rows hold several documents, which the convolution does not support.
  parts = [f"{name} {'chunked' if form == 'conv' else form}" for name, form in chosen.items()]
  return f"implementations on {jax.default_backend()}: " + ", ".join(parts)


def main(arguments: Sequence[str]) -> None:
  """Runs the benchmark and prints the tables."""
  parser = common.parser(__doc__, "a tiny model, one family, few options, once")
  parser.add_argument("--family", default="mamba2", choices=SSM_FAMILIES,
                      help="whose options the second table measures (mamba2)")
  options = parser.parse_args(arguments)
  size, repeats = (QUICK, 1) if options.quick else (FULL, 5)
  families = [options.family] if options.quick else SSM_FAMILIES
  chosen = {name: OPTIONS[name] for name in (QUICK_OPTIONS if options.quick else OPTIONS)}
  print(running(families))
  print(f"{size}, {repeats} repetitions, float32, {common.hardware()}", flush=True)

  bar = tqdm.tqdm(total=(len(families) + len(chosen)) * repeats, unit="pair",
                  disable=common.quiet(), dynamic_ncols=True)

  def step(family: str, **dense: object) -> TrainStep:
    return TrainStep(common.config(family, size, dense=dense), documents=DOCUMENTS)

  def measure(name: str, base: TrainStep, family: str, **dense: object) -> Measured | None:
    bar.set_description(name)
    try:
      other = step(family, **{"depth": DEPTH, **dense})
    except InputError:
      bar.update(repeats)
      return None
    return compare(base, other, repeats, bar.update)

  by_family = {}
  for name in families:
    bar.set_description(f"{name}: compiling")
    by_family[name] = measure(name, step(name), name)
  with bar.external_write_mode():
    print("\n" + markdown(f"family, m = {DEPTH}", by_family), flush=True)

  base = step(options.family)
  by_option = {
      name: measure(name, base, options.family, **dense) for name, dense in chosen.items()
  }
  bar.close()
  print("\n" + markdown(f"{options.family}, m = {DEPTH} but for", by_option))
  if options.json:
    def figures(rows: dict[str, Measured | None]) -> dict[str, Any]:
      return {name: measured and measured.figures() for name, measured in rows.items()}

    results = {
        "families": figures(by_family), "options_family": options.family,
        "options": figures(by_option),
    }
    common.write_json(options.json, common.record(
        "dense_overhead", arguments, "seconds of a train step; null: refused", results,
        size=dataclasses.asdict(size), repeats=repeats,
    ))


if __name__ == "__main__":
  main(sys.argv[1:])
