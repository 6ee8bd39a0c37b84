"""Training speed at a constant number of tokens per batch, in rows of increasing length."""

import statistics
from collections.abc import Iterator

from experiments.benchmarks import common
from experiments.benchmarks.common import SSM_FAMILIES, Size, Table, TrainStep

LENGTHS = (512, 2048, 8192, 16384)
CONSTANT_FAMILIES = ("mamba", "mamba2", "gau_retnet", "s4d")
CONSTANT_LENGTHS = (2048, 32768)
CONSTANT_BAR = 0.9
# D. If the batch is a single row, its states alone must keep the vector units busy.
WIDTH, CONSTANT_WIDTH, LAYERS = 128, 256, 2


def _step(family: str, width: int, length: int, tokens: int, remat: str) -> TrainStep:
  """Makes a train step on rows of one document each, with `tokens` tokens per batch."""
  size = Size(width, LAYERS, 256, tokens // length, length)
  return TrainStep(common.config(family, size, remat=remat))


def lengths(quick: bool) -> Iterator[Table]:
  """Times training of every family, in its default form, at several lengths in turn."""
  chosen, tokens = ((64, 128), 128) if quick else (LENGTHS, 16384)
  rows = [["family, tokens/s at T", *map(str, chosen), f"T {chosen[-1]} over T {chosen[0]}"]]
  results = {}
  for family in common.progress(("gau_retnet",) if quick else SSM_FAMILIES, "lengths"):
    width = 32 if quick else WIDTH
    steps = [_step(family, width, length, tokens, "none") for length in chosen]
    rounds = [[step() for step in steps] for _ in range(1 if quick else 7)]
    rates = [tokens / statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
    ratio = statistics.median(seconds[0] / seconds[-1] for seconds in rounds)
    results[family] = common.figures(
        **{f"tokens_per_second {length}": rate for length, rate in zip(chosen, rates, strict=True)},
        ratio=ratio,
    )
    rows.append([family, *map(common.number, rates), common.ratio(ratio)])
  yield Table(f"Training, {tokens} tokens a batch, one document a row", rows, results)


def constant(quick: bool) -> Iterator[Table]:
  """Compares long rows with short ones, with each layer and each read rematerialised."""
  short, long = (64, 256) if quick else CONSTANT_LENGTHS
  rows = [["family, tokens/s at T", str(short), str(long), f"T {long} over T {short}", "range",
           "bar"]]
  results = {}
  for family in common.progress(("mamba2",) if quick else CONSTANT_FAMILIES, "constant"):
    width = 32 if quick else CONSTANT_WIDTH
    times = common.compare(
        _step(family, width, long, long, "full"), _step(family, width, short, long, "full"),
        1 if quick else 7,
    )
    rates = long / times.second, long / times.first
    results[family] = common.figures(
        **{f"tokens_per_second {short}": rates[0], f"tokens_per_second {long}": rates[1]},
        ratio=times.ratio, low=times.low, high=times.high, bar=CONSTANT_BAR,
    )
    rows.append([family, *map(common.number, rates), common.ratio(times.ratio),
                 times.range(), common.bar(CONSTANT_BAR)])
  yield Table(f"Training, {long} tokens a batch, remat full", rows, results)
