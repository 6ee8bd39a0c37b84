"""Speed on a CPU, where possible beside a rival that is measured in the same run.

Command   GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.benchmarks.cpu \
              --json experiments/results/cpu_DATE.json
Hardware  two cores, float32
Parts     authors   gau_retnet as the authors train and sample it, against their PyTorch code
                    (constants below, measured separately) and against the quadratic form
          lengths   training of each family at a constant number of tokens per batch, in rows of
                    increasing length
          modes     a mixer's default form against one associative scan (matrix states: against
                    chunks joined by an associative scan)
          dense     dense over base: times of a train step and of a decoding step, the latter
                    beside the ratio of the bytes that they move
          decode    decoding of each family against a transformer's
          bandwidth memory bandwidth in GB/s of the operations that decoding consists of
          constant  tokens/s at T 32768 over T 2048, rematerialised
Ratios are of speeds, so that more than 1 is faster, except in `dense`, where they are of times.
The columns called "bar" give the ratio that must be reached.
"""

import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dense_jax.config import ExperimentConfig
from experiments.benchmarks import common, cpu_dense, cpu_lengths, cpu_modes
from experiments.benchmarks.common import Decoding, Size, Table, TrainStep

# The authors' PyTorch code (gau_retnet, D 512, K 256, 2 heads, 8 layers, V 8192, m = 1) on two
# cores of a similar machine: training tokens/s by T, and decoded tokens/s by B.
PYTORCH_TRAIN = {2048: 419.0, 4096: 255.0}
PYTORCH_DECODE = {1: 89.0, 6: 278.0}
TRAIN_BARS = {2048: 1.0, 4096: 1.7}
DECODE_BARS = {1: 2.5, 6: 4.0}


def authors_config(time_steps: int, *, quick: bool, **model: object) -> ExperimentConfig:
  """Makes the configuration of the authors' model for one sequence length."""
  width, layers = (64, 2) if quick else (512, 8)
  return common.config(
      "gau_retnet", Size(width, layers, 8192, 1, time_steps),
      mixer={"heads": 2, "key_dim": width // 2},
      dense={"depth": 1, "inject": "inputs", "gate_init": "normal"},
      tie_embeddings=False, norm_eps=1e-6, **model,
  )


def authors_training(quick: bool) -> Table:
  """Measures training tokens/s (forward, backward and AdamW) by sequence length."""
  rows = [["T", "tokens/s", "quadratic", "over quadratic", "PyTorch", "over PyTorch", "bar"]]
  results = {}
  for length in common.progress((256,) if quick else (2048, 4096, 8192), "authors, training"):
    def rate(length: int = length, **model: object) -> float:
      step = TrainStep(authors_config(length, quick=quick, **model))
      return step.tokens / common.median(step, 1 if quick else 3)

    ours = rate()
    # With 8192 tokens the quadratic form takes minutes, and shows nothing new.
    quadratic = rate(chunk=length) if length <= 4096 else None
    torch = None if quick else PYTORCH_TRAIN.get(length)
    over = quadratic and ours / quadratic
    over_torch = torch and ours / torch
    bar = None if quick else TRAIN_BARS.get(length)
    results[f"train {length}"] = common.figures(
        chunked=ours, quadratic=quadratic, pytorch=torch, over_quadratic=over,
        over_pytorch=over_torch, bar=bar,
    )
    rows.append([f"{length}", f"{ours:.0f}", common.number(quadratic), common.ratio(over),
                 common.number(torch), common.ratio(over_torch), common.bar(bar)])
  return Table("gau_retnet as the authors train it", rows, results)


def memory() -> int:
  """Returns the resident memory of this process, in bytes."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def decoded(batch_size: int, new_tokens: int, *, quick: bool) -> tuple[float, float, int]:
  """Decodes `new_tokens` tokens for each row.

  Returns:
    Tokens/s of all rows together at the beginning and at the end, and the growth of the
    process's memory in between, in bytes.
  """
  decoding = Decoding(authors_config(64, quick=quick), batch_size)
  rates: list[float] = []
  before = memory()
  while len(rates) * 64 < new_tokens:
    rates.append(batch_size / decoding())
    if len(rates) == 2:
      before = memory()
  some = max(2, len(rates) // 10)
  return statistics.median(rates[:some]), statistics.median(rates[-some:]), memory() - before


def authors_decoding(quick: bool) -> Table:
  """Measures decoded tokens/s by batch size."""
  new_tokens = 128 if quick else 10_000
  rows = [["B", "first tokens/s", f"to {new_tokens}", "last / first", "PyTorch", "over PyTorch",
           "bar", "memory growth"]]
  results = {}
  for batch_size in common.progress((1,) if quick else (1, 6), "authors, decoding"):
    first, last, growth = decoded(batch_size, new_tokens, quick=quick)
    # The authors' code was not measured at the toy size.
    torch, bar = (None, None) if quick else (PYTORCH_DECODE[batch_size], DECODE_BARS[batch_size])
    over_torch = torch and last / torch
    results[f"decode {batch_size}"] = common.figures(
        first=first, last=last, pytorch=torch, over_pytorch=over_torch, bar=bar,
        memory_growth=growth,
    )
    rows.append([f"{batch_size}", f"{first:.0f}", f"{last:.0f}", f"{last / first:.2f}",
                 common.number(torch), common.ratio(over_torch), common.bar(bar),
                 f"{growth / 2**20:.1f} MiB"])
  return Table("gau_retnet as the authors sample from it", rows, results)


def authors(quick: bool) -> Iterator[Table]:
  """Yields both tables against the authors' code."""
  yield authors_training(quick)
  yield authors_decoding(quick)


PARTS: dict[str, Callable[[bool], Iterator[Table]]] = {
    "authors": authors,
    "lengths": cpu_lengths.lengths,
    "modes": cpu_modes.modes,
    "dense": cpu_dense.dense,
    "decode": cpu_dense.decode,
    "bandwidth": cpu_dense.bandwidth,
    "constant": cpu_lengths.constant,
}


def main(arguments: Sequence[str]) -> None:
  """Runs the parts; prints and records each table when it is done."""
  parser = common.parser(__doc__, "toy sizes")
  parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                      help=f"some of {', '.join(PARTS)} (all)")
  options = parser.parse_args(arguments)
  print(f"float32, {common.hardware()}\n", flush=True)
  results: dict[str, Any] = {}
  for name in options.only:
    for table in PARTS[name](options.quick):
      print(table, flush=True)
      results.setdefault(name, {}).update(table.results)
      if options.json:
        common.write_json(options.json, common.record(
            "cpu", arguments,
            "tokens/s or seconds; `pytorch`: the authors' code on such a machine, measured apart",
            results,
        ))


if __name__ == "__main__":
  main(sys.argv[1:])
