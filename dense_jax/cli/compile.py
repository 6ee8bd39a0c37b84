"""Compiles a run's program for a TPU topology, without a TPU: does it fit, what does it do."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from dense_jax import experiment
from dense_jax.analysis.hlo_text import HloError
from dense_jax.cli import aot, common
from dense_jax.config import ExperimentConfig, MeshConfig, field_types, invalid
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.files import write_atomically
from dense_jax.types import InputError

_EPILOG = """
for example
  --config experiments/dense_retnet_1p3b.py --topology v5p:4x4x4 --mesh data=4,fsdp=16
Any key of the configuration is set by --config.KEY=VALUE, as in training.
Ends with status 0 if the program fits a chip's memory, 1 if it does not, 2 on bad input.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints, and with --json writes, what the compiler says; 0 if the program fits, else 1."""
  command = common.parser(
      "compile", "Compiles a program of a run for a TPU topology; needs no TPU. Minutes."
  )
  command.epilog = _EPILOG
  command.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="an experiment")
  command.add_argument("--topology", required=True, metavar="KIND:SHAPE",
                       help="the chips, such as v5e:4x4, v6e:8x8, v4:2x2x2, v5p:4x4x4")
  command.add_argument("--mesh", default="", metavar="AXIS=SIZE,...",
                       help="the mesh; other axes are 1 (default: the configuration's, or "
                       "fsdp over all chips where that does not divide them)")
  command.add_argument("--program", default="train", choices=aot.PROGRAMS,
                       help="train step (default), eval loss, prefill of a prompt of seq_len, "
                       "decode of one token; all of train.batch_size rows")
  command.add_argument("--json", default="", metavar="FILE", help="write the figures there")
  options, overrides = common.split_overrides(command, arguments)
  config = _with_vocab(experiment.load(options.config, overrides))
  count = len(aot.topology_devices(options.topology))
  mesh = _parse_mesh(options.mesh) if options.mesh else aot.fit_mesh(config.mesh, count)
  config = dataclasses.replace(config, mesh=mesh)

  def say(what: str) -> None:
    print(f"{what} {options.program} for {options.topology} ...", file=sys.stderr, flush=True)

  try:
    report = aot.compile_program(config, options.topology, options.program, say=say)
  except HloError as error:
    raise InputError(f"what the program costs cannot be told: {error}") from error
  print(_describe(report))
  if options.json:
    text = json.dumps(report.as_dict(), indent=2) + "\n"
    write_atomically(pathlib.Path(options.json), text.encode())
  return 0 if report.fits else 1


def _parse_mesh(text: str) -> MeshConfig:
  """`data=4,fsdp=16` as a mesh; axes that are not named are 1."""
  axes = list(field_types(MeshConfig))
  sizes = dict.fromkeys(axes, 1)
  for part in text.split(","):
    axis, _, size = part.strip().partition("=")
    if axis not in axes or not size.removeprefix("-").isdigit():
      raise invalid("--mesh", text, f"AXIS=SIZE,... with axes {', '.join(axes)}")
    sizes[axis] = int(size)
  return MeshConfig(**sizes)


def _with_vocab(config: ExperimentConfig) -> ExperimentConfig:
  """The configuration with the vocabulary that its tokenizer will have."""
  kind = config.data.tokenizer
  sizes = {"bytes": ByteTokenizer.vocab_size, "train": config.data.vocab_size}
  size = config.model.vocab_size or sizes.get(kind, 0)
  if not size:
    raise invalid("config.model.vocab_size", 0, f"the number of pieces of the tokenizer {kind}")
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _describe(report: aot.Report) -> str:
  """What is printed: memory, operations, collectives, bounds, and whether it fits."""
  memory, cost, bound = report.memory, report.cost, report.bound
  mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
  lines = [
      f"{report.program} on {report.topology}: {report.chips} chips, mesh {mesh}, "
      f"compiled in {report.compile_seconds:.0f} s",
      "",
  ]
  gigabytes = [("memory a chip", "GB")] + [
      (name, f"{size / 1e9:.2f}")
      for name, size in dataclasses.asdict(memory).items() if size is not None
  ]
  lines.append(common.table(gigabytes))
  if cost is not None and bound is not None:
    lines += ["", common.table([
        ("work a chip", ""),
        ("matmul TFLOP", f"{cost.matmul_flops / 1e12:.3f}"),
        ("all TFLOP", f"{cost.flops / 1e12:.3f}"),
        ("transcendentals, 1e9", f"{cost.transcendentals / 1e9:.2f}"),
        ("HBM traffic, GB", f"{cost.bytes_accessed / 1e9:.2f}"),
    ])]
    if cost.collectives:
      rows = [(c.kind, f"{c.count:,}", f"{c.bytes / 1e9:.3f}") for c in cost.collectives]
      lines += ["", common.table([("collectives a chip", "count", "GB"), *rows])]
    lines += ["", common.table([
        ("no faster than (a bound, not a time)", "ms"),
        ("matmuls at peak bf16 FLOP/s", f"{bound.compute * 1e3:.2f}"),
        ("HBM traffic at its bandwidth", f"{bound.memory * 1e3:.2f}"),
        ("collectives at the links' bandwidth", f"{bound.collectives * 1e3:.2f}"),
        ("all of them", f"{bound.seconds * 1e3:.2f}"),
    ])]
  lines += ["", _verdict(report)]
  return "\n".join(lines)


def _verdict(report: aot.Report) -> str:
  peak, capacity = report.memory.peak / 1e9, report.memory.capacity / 1e9
  if report.fits:
    return f"fits: {peak:.2f} of {capacity:.0f} GB a chip"
  refused = "; the compiler refused it" if report.cost is None else ""
  return f"does not fit: it needs {peak:.2f} GB a chip, which has {capacity:.0f} GB{refused}"


if __name__ == "__main__":
  common.run(main)
