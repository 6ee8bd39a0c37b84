"""Makes the tables of `experiments.benchmarks.gpu` from its results."""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.benchmarks import common
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


def tables(results: Results) -> Iterator[Table]:
  """Yields the tables that have rows."""
  for make in (training, modes, decoding, contexts):
    table = make(results)
    if len(table.rows) > 1:
      yield table
