"""Training at the same number of tokens a batch in longer and longer rows."""

from collections.abc import Iterator

from experiments.benchmarks import common
from experiments.benchmarks.common import SSM_FAMILIES, Size, Table, TrainStep

LENGTHS = (512, 2048, 8192, 16384)
CONSTANT_FAMILIES = ("mamba", "mamba2", "gau_retnet", "s4d")
CONSTANT_LENGTHS = (2048, 32768)
CONSTANT_BAR = 0.9
# D. One row's states have to keep the vector units busy where the batch is one row.
WIDTH, CONSTANT_WIDTH, LAYERS = 128, 256, 2


def _rates(
    family: str, width: int, lengths: tuple[int, ...], tokens: int, remat: str
) -> list[float]:
  """Training tokens/s at each length, `tokens` a batch, a document a row."""
  rates = []
  for length in lengths:
    size = Size(width, LAYERS, 256, tokens // length, length)
    step = TrainStep(common.config(family, size, remat=remat))
    rates.append(step.tokens / common.median(step, 2))
  return rates


def lengths(quick: bool) -> Iterator[Table]:
  """Every family, in the forms that it trains with by default."""
  chosen, tokens = ((64, 128), 128) if quick else (LENGTHS, 16384)
  rows = [["family, tokens/s at T", *map(str, chosen), f"T {chosen[-1]} over T {chosen[0]}"]]
  results = {}
  for family in common.progress(("gau_retnet",) if quick else SSM_FAMILIES, "lengths"):
    rates = _rates(family, 32 if quick else WIDTH, chosen, tokens, "none")
    ratio = rates[-1] / rates[0]
    results[family] = common.figures(
        **{f"tokens_per_second {length}": rate for length, rate in zip(chosen, rates, strict=True)},
        ratio=ratio,
    )
    rows.append([family, *map(common.number, rates), common.ratio(ratio)])
  yield Table(f"Training, {tokens} tokens a batch, one document a row", rows, results)


def constant(quick: bool) -> Iterator[Table]:
  """Long rows against short ones, each layer and each read rematerialised."""
  chosen = (64, 256) if quick else CONSTANT_LENGTHS
  tokens = chosen[-1]
  rows = [["family, tokens/s at T", *map(str, chosen), f"T {chosen[1]} over T {chosen[0]}", "bar"]]
  results = {}
  for family in common.progress(("mamba2",) if quick else CONSTANT_FAMILIES, "constant"):
    rates = _rates(family, 32 if quick else CONSTANT_WIDTH, chosen, tokens, "full")
    ratio = rates[1] / rates[0]
    results[family] = common.figures(
        **{f"tokens_per_second {length}": rate for length, rate in zip(chosen, rates, strict=True)},
        ratio=ratio, bar=CONSTANT_BAR,
    )
    rows.append([family, *map(common.number, rates), common.ratio(ratio), common.bar(CONSTANT_BAR)])
  yield Table(f"Training, {tokens} tokens a batch, remat full", rows, results)
