"""Compiles a run's program for TPUs or GPUs, without any; says whether it fits."""

import dataclasses
import sys
from collections.abc import Sequence

from dense_jax import experiment, sharding
from dense_jax.cli import common, config_help
from dense_jax.config import MeshConfig, field_types, invalid
from dense_jax.costs import largest
from dense_jax.costs.hlo import Item, total
from dense_jax.formatting import scaled, table
from dense_jax.outputs import check_file, write_json
from dense_jax.runs import compile as programs
from dense_jax.runs import compile_targets as targets

_EPILOG = """
for example
  --config experiments/dense_retnet_1p3b.py --topology v5p:4x4x4 --mesh data=4,fsdp=16
  --config experiments/dense_retnet_1p3b.py --topology h100:8
GPUs need their compiler, once: `make gpu-compiler`; TPUs need what `make test` installs.
Any key of the configuration is set by --config.KEY=VALUE, as in training.
Ends with status 0 if the program fits a chip's memory, 1 if it does not, 2 on bad input.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints the compiler's figures and, with --json, writes them.

  Returns:
    Status 0 if the program fits a chip's memory, else 1.
  """
  command = common.parser(
      "compile", "Compiles a program of a run for TPUs or GPUs; needs none of them. Minutes."
  )
  command.epilog = _EPILOG
  command.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="an experiment")
  command.add_argument("--topology", required=True, metavar="KIND:SHAPE",
                       help="the chips, such as v5e:4x4, v6e:8x8, v4:2x2x2, h100:8, h200:1")
  command.add_argument("--mesh", default="", metavar="AXIS=SIZE,...",
                       help="the mesh; other axes are 1 (default: the configuration's, or "
                       "fsdp over all chips where that does not divide them)")
  command.add_argument("--program", default="train", choices=programs.PROGRAMS,
                       help="train step (default), eval loss, prefill of a prompt of seq_len, "
                       "decode of one token; all of train.batch_size rows")
  command.add_argument("--largest", type=int, default=0, metavar="N",
                       help="also the N instructions, and lines of code, that move the most bytes")
  command.add_argument("--json", metavar="FILE", help="write the figures there")
  config_help.add_argument(command)
  if config_help.is_asked(arguments):
    return config_help.show(command, arguments)
  options, overrides = common.split_overrides(command, arguments)
  config = experiment.load(options.config, overrides)
  status = targets.run_elsewhere(options.topology, "dense_jax.cli.compile", arguments)
  if status is not None:
    return status
  count = len(targets.topology_devices(options.topology))
  mesh = _parse_mesh(options.mesh) if options.mesh else targets.fit_mesh(config.mesh, count)
  config = dataclasses.replace(config, mesh=mesh)
  file = None if options.json is None else check_file(options.json, "--json")

  def say(what: str) -> None:
    print(f"{what} {options.program} for {options.topology} ...", file=sys.stderr, flush=True)

  report = programs.compile_program(config, options.topology, options.program, say=say)
  print(_describe(report))
  if options.largest:
    print("\n" + _largest(report.items, options.largest))
  if file is not None:
    write_json(file, report.as_dict(), "--json")
  return 0 if report.fits else 1


def _parse_mesh(text: str) -> MeshConfig:
  """Parses a mesh such as `data=4,fsdp=16`.

  An axis that is not named is 1, except `slices`, which is 0: as many as the devices have.
  """
  axes = list(field_types(MeshConfig))
  sizes = dict.fromkeys(axes, 1) | {"slices": 0}
  for part in text.split(","):
    axis, _, size = part.strip().partition("=")
    if axis not in axes or not size.removeprefix("-").isdigit():
      raise invalid("--mesh", text, f"AXIS=SIZE,... with axes {', '.join(axes)}")
    sizes[axis] = int(size)
  return MeshConfig(**sizes)


def _describe(report: programs.CompiledProgram) -> str:
  """Returns the text to print: memory, work, collectives, bounds, and whether it fits."""
  cost, bound = report.cost, report.bound
  mesh = sharding.describe_mesh(report.mesh)
  memory = [
      (name, scaled(size, "B"))
      for name, size in dataclasses.asdict(report.memory).items() if size is not None
  ]
  parts = [
      f"{report.program} on {report.topology}: {report.chips} chips, mesh {mesh}, "
      f"compiled in {report.compile_seconds:.0f} s",
      table([("memory a chip", ""), *memory]),
  ]
  if cost is not None and bound is not None:
    parts.append(table([
        ("work a chip", ""),
        ("matmuls", scaled(cost.matmul_flops, "FLOP")),
        ("all arithmetic", scaled(cost.flops, "FLOP")),
        ("exp, log and the like", scaled(cost.transcendentals, "")),
        ("HBM traffic", scaled(cost.bytes_accessed, "B")),
        *([("kernel launches", f"{cost.launches:,.0f}")] if report.estimate else []),
    ]))
    collectives = [(c.kind, f"{c.count:,}", scaled(c.bytes, "B")) for c in cost.collectives]
    if collectives:
      parts.append(table([("collectives a chip", "count", ""), *collectives]))
    parts.append(table([
        ("no run is faster than (a bound, not a time)", ""),
        ("matmuls at peak bf16 FLOP/s", scaled(bound.compute, "s")),
        ("HBM traffic at peak bandwidth", scaled(bound.memory, "s")),
        ("collectives at the links' peak bandwidth", scaled(bound.collectives, "s")),
        ("the slowest of them", scaled(bound.seconds, "s")),
    ]))
  if report.estimate is not None:
    parts.append(table([
        ("estimated step (not measured; without collectives)", ""),
        ("matmuls at the rate of a large one", scaled(report.estimate.matmuls, "s")),
        ("HBM traffic at the bandwidth of a copy", scaled(report.estimate.memory, "s")),
        ("the sum", scaled(report.estimate.seconds, "s")),
        ("rates from", "experiments/results/gpu_rates_2026-11-26.json"),
        ("steps with kernels took", "1.1 to 3 times this on an H200 (docs/performance.md)"),
    ]))
  if report.note:
    parts.append(f"note: {report.note}")
  return "\n\n".join([*parts, _verdict(report)])


def _largest(items: Sequence[Item], count: int) -> str:
  """Returns two tables: the largest instructions, and the largest lines of code, by bytes."""
  everything = total(items).bytes_accessed
  tables = []
  for title, entries in (
      ("instructions that move the most bytes", largest.instructions(items, count)),
      ("lines of code that move the most bytes", largest.lines(items, count)),
  ):
    rows = [(title, "share", "runs", "bytes a run", "pass", "what")]
    rows += [
        (each.lines, f"{each.bytes / everything:.1%}", f"{each.runs:,}",
         scaled(each.bytes / each.runs, "B"), each.phase, each.what)
        for each in entries if each.bytes
    ]
    tables.append(table(rows))
  return "\n\n".join(tables)


def _verdict(report: programs.CompiledProgram) -> str:
  peak, capacity = (scaled(size, "B") for size in (report.memory.peak, report.memory.capacity))
  if report.fits:
    return f"fits: {peak} of a chip's {capacity}"
  refused = ", and the compiler refused it" if report.cost is None else ""
  return f"does not fit: it needs {peak} of a chip's {capacity}{refused}"


if __name__ == "__main__":
  common.run(main)
