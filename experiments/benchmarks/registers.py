r"""Registers, spills and shared memory of GPU kernels, from the compiler's log; needs no GPU.

    python -m experiments.benchmarks.registers [--only NAME ...] [--json FILE] -- COMMAND

COMMAND compiles for a GPU, such as `python -m dense_jax.cli.compile --topology h100:1 ...`, or a
script that calls `dense_jax.runs.compile.compile_function`. Its output goes to standard error. A
block of a kernel with R registers a thread and T threads fits an H100's multiprocessor
65536 / (R T) times, and with S bytes of shared memory 233472 / S times.

Of kernels of Pallas' Mosaic GPU back end only registers and spills are known: the compiler does
not list their launches.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from dense_jax.formatting import markdown_table
from experiments.benchmarks import common

# Makes the compiler log what ptxas says of each kernel, which it compiles one by one.
_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "subprocess_compilation=10"}
_PTXAS = re.compile(
    r"Function properties for (\S+)\n"
    r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"ptxas info\s*: Used (\d+) registers"
)
_LAUNCH = re.compile(
    r"kCustomKernel .*?\] (\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+)"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel as it was compiled.

  Attributes:
    registers: registers of a thread.
    spilled: bytes that a thread stores to and loads from memory for want of registers.
    grid, threads: the blocks of a launch, and the threads of a block, such as "64, 1, 1"; "" if
      the program does not launch it.
    shared_memory: bytes of shared memory of a block.
  """

  registers: int
  spilled: int
  grid: str = ""
  threads: str = ""
  shared_memory: int = 0


def kernels(log: str, launches: str) -> dict[str, Kernel]:
  """Returns the kernels by name.

  Args:
    log: the compiler's log, with what ptxas says.
    launches: the program's launches, from the compiler's dump.
  """
  found = {
      name: Kernel(int(registers), int(stored) + int(loaded))
      for name, _, stored, loaded, registers in _PTXAS.findall(log)
  }
  for name, grid, threads, shared in _LAUNCH.findall(launches):
    if name in found:
      found[name] = dataclasses.replace(
          found[name], grid=grid, threads=threads, shared_memory=int(shared)
      )
  return found


def table(found: dict[str, Kernel]) -> list[list[str]]:
  """Makes the table, the kernels with the most registers first."""
  rows = [["kernel", "registers", "spilled, B", "grid", "threads", "shared memory, B"]]
  for name, kernel in sorted(found.items(), key=lambda item: -item[1].registers):
    rows.append([name, f"{kernel.registers}", f"{kernel.spilled}", kernel.grid, kernel.threads,
                 f"{kernel.shared_memory}"])
  return rows


def main(arguments: Sequence[str]) -> None:
  """Runs the command and prints the table of the kernels that it compiles."""
  parser = common.parser(__doc__)
  parser.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                      help="kernels whose names have one of these in them (all)")
  parser.add_argument("command", nargs="+", help="what compiles for a GPU")
  options = parser.parse_args(arguments)
  with tempfile.TemporaryDirectory() as folder:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} " \
        "--xla_gpu_ptx_compiler_extra_flags=-v"
    done = subprocess.run(
        options.command, env=os.environ | _ENVIRONMENT | {"XLA_FLAGS": flags.strip()},
        capture_output=True, text=True, check=False,
    )
    dumped = sorted(pathlib.Path(folder).glob("*thunk_sequence.txt"))
    launches = "\n".join(file.read_text() for file in dumped)
  print(done.stdout, file=sys.stderr)
  found = {
      name: kernel for name, kernel in kernels(done.stderr, launches).items()
      if any(text in name for text in options.only)
  }
  if done.returncode not in (0, 1) or not found:
    raise SystemExit(f"no kernels were compiled:\n{done.stderr[-2000:]}")
  if options.json:
    common.write_json(options.json, common.record(
        "registers", arguments, "per thread and per block; see registers.py",
        {name: dataclasses.asdict(kernel) for name, kernel in found.items()},
    ))
  print(markdown_table(table(found)))


if __name__ == "__main__":
  main(sys.argv[1:])
