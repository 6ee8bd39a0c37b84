"""Makes the tables of `experiments.benchmarks.gpu` from its results."""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.benchmarks import common, prices
from experiments.benchmarks.common import Table

Results = Mapping[str, Mapping[str, Any]]


def _get(results: Results, name: str, key: str) -> float | None:
  """Returns a figure; None means that the case was not run, has failed, or does not have it."""
  return results.get(name, {}).get(key)


def _over(first: float | None, second: float | None) -> float | None:
  return first / second if first and second else None


def _gigabytes(value: float | None) -> str:
  return "" if value is None else f"{value / 1e9:.1f}"


def _named(results: Results, kind: str) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
  """Yields (model, variant, size, figures) of the cases of a kind that have figures."""
  for name, figures in results.items():
    found, model, variant, size = name.split("/")
    if found == kind and "tokens_per_second" in figures:
      yield model, variant, size, figures


def training(results: Results) -> Table:
  """Makes the table of training: dense over base, and ours over the rival."""
  rows = [["model", "dense", "T", "tokens/s", "over base", "over fla", "MFU", "peak GB",
           "fla, peak GB", "remat (fla)"]]
  for model, dense, size, figures in _named(results, "train"):
    rate = figures["tokens_per_second"]
    rival = results.get(f"rival/{model}/base/{size}", {})
    mfu = figures["mfu"]
    remat = figures["remat"] + (f" ({rival['remat']})" if "remat" in rival else "")
    rows.append([
        model, dense, size.removeprefix("T"), common.number(rate),
        common.ratio(_over(rate, _get(results, f"train/{model}/base/{size}", "tokens_per_second"))),
        common.ratio(_over(rate, rival.get("tokens_per_second"))),
        "" if mfu is None else f"{100 * mfu:.1f}%",
        _gigabytes(figures["peak_bytes"]), _gigabytes(rival.get("peak_bytes")),
        remat,
    ])
  return Table("Training; fla: flash-linear-attention's base model of that size", rows, {})


def modes(results: Results) -> Table:
  """Makes the table of implementations, relative to the slowest one of each family."""
  rows = [["model", "implementation", "T", "tokens/s", "over the slowest", "peak GB"]]
  found = list(_named(results, "mode"))
  for model, form, size, figures in found:
    slowest = min(each[3]["tokens_per_second"] for each in found if each[0] == model)
    rate = figures["tokens_per_second"]
    rows.append([model, form, size.removeprefix("T"), common.number(rate),
                 common.ratio(rate / slowest), _gigabytes(figures["peak_bytes"])])
  return Table("Implementations, training", rows, {})


def decoding(results: Results) -> Table:
  """Makes the table of decoding: dense over base."""
  rows = [["model", "dense", "B", "tokens/s", "over base", "peak GB"]]
  for model, dense, size, figures in _named(results, "decode"):
    rate = figures["tokens_per_second"]
    base = _get(results, f"decode/{model}/base/{size}", "tokens_per_second")
    rows.append([model, dense, size.removeprefix("B"), common.number(rate),
                 common.ratio(_over(rate, base)), _gigabytes(figures["peak_bytes"])])
  return Table("Decoding", rows, {})


def contexts(results: Results) -> Table:
  """Makes the table of a step's time by context length, relative to the shortest context."""
  rows = [["model", "dense", "context", "step, ms", "time over the shortest context's"]]
  found = list(_named(results, "context"))
  for model, dense, size, figures in found:
    shortest = min((each for each in found if each[:2] == (model, dense)),
                   key=lambda each: int(each[2]))
    seconds = figures["step_seconds"]
    rows.append([model, dense, size, f"{1e3 * seconds:.2f}",
                 common.ratio(seconds / shortest[3]["step_seconds"])])
  return Table("A step of decoding, B 1", rows, {})


def checks(results: Results) -> Table:
  """Makes the table of the kernels' errors: the three largest of each family."""
  rows = [["family", "form", "largest errors"]]
  for name, found in results.items():
    for form, figures in found.get("errors", {}).items():
      largest = sorted(figures.items(), key=lambda item: -item[1])[:3]
      rows.append([name.split("/")[1], form,
                   ", ".join(f"{what} {error:.1e}" for what, error in largest)])
  return Table("Errors of kernels in bfloat16, over the specification in float32", rows, {})


def layers(results: Results) -> Table:
  """Makes the table of a layer's recurrence."""
  rows = [["family", "sources", "ms", "kernels, ms each"]]
  for name, found in results.items():
    kind, family, sources, _ = name.split("/")
    if kind == "layer" and "seconds" in found:
      kernels = {key: value for key, value in found.get("kernels", {}).items() if "kernel" in key}
      rows.append([family, sources.removeprefix("state-"), f"{1e3 * found['seconds']:.2f}",
                   ", ".join(f"{key} {value:.2f}" for key, value in kernels.items())])
  return Table("A layer's recurrence, forward and backward", rows, {})


def rates(results: Results) -> Table:
  """Makes the table of the card's rates."""
  rows = [["matmul, TFLOP/s", "copy, TB/s"]]
  if (figures := results.get("rates/card/all/large")) and "failed" not in figures:
    keys = ("matmul_flops_per_second", "copied_bytes_per_second")
    rows.append([f"{figures[key] / 1e12:.4g}" for key in keys])
  return Table("Rates of one large operation", rows, {})


# Name of a dense variant of `gpu` -> that of `prices`.
_KINDS = {"base": "base", "state-1": "state m=1", "state-2": "state m=2", "inputs-1": "inputs m=1"}


def estimates(results: Results, reports: Mapping[str, Any]) -> Table:
  """Makes the table of measured over estimated times of a train step.

  Args:
    results: the measured cases.
    reports: the results of `prices`, for the same kind of card.
  """
  rows = [["model", "dense", "step, ms", "estimate, ms", "measured over estimate", "launches"]]
  for model, dense, size, figures in _named(results, "train"):
    kind = figures.get("device", "").lower().split()
    target = next((name for name in ("h100", "h200") if name in kind), "")
    report = reports.get(f"{target} | {model} | {_KINDS[dense]}")
    if size != f"T{prices.LENGTH}" or not report:
      continue
    found = prices.price(report)
    tokens = report["config"]["train"]["batch_size"] * report["config"]["data"]["seq_len"]
    seconds = tokens / figures["tokens_per_second"]
    rows.append([
        model, dense, f"{1e3 * seconds:.0f}", f"{1e3 * found.seconds:.0f}",
        common.ratio(seconds / found.seconds), f"{found.launches:,.0f}",
    ])
  return Table("Measured over estimated", rows, {})


def operations(results: Results) -> Table:
  """Makes the table of single operations, ours and the rival's."""
  rows = [["operation, forward and backward", "ours, ms", "mamba_ssm, ms", "rival over ours"]]
  for name in ("ssd", "scan"):
    ours, theirs = (
        _get(results, f"operation/{name}/{who}/T2048", "seconds") for who in ("ours", "mamba_ssm")
    )
    if ours or theirs:
      times = ["" if value is None else f"{1e3 * value:.2f}" for value in (ours, theirs)]
      rows.append([name, *times, common.ratio(_over(theirs, ours))])
  return Table("Operations", rows, {})


def tables(results: Results, reports: Mapping[str, Any]) -> Iterator[Table]:
  """Yields the tables that have rows; `reports` are the results of `prices`, or none."""
  for table in (
      checks(results), rates(results), layers(results), training(results),
      estimates(results, reports), modes(results), decoding(results), contexts(results),
      operations(results),
  ):
    if len(table.rows) > 1:
      yield table
