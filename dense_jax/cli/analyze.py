"""Looks into a run's layers: what their states share, what is lost with depth, who reads what."""

import argparse
import shlex
from collections.abc import Sequence

import numpy as np
from etils import epath
from tqdm import tqdm

from dense_jax import runs
from dense_jax.analysis.model import Seen, look_into
from dense_jax.analysis.plot import plot_groups, plot_seen
from dense_jax.analysis.summary import add_summary, markdown, read_summaries, summarize
from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.files import locked, whole_path, write_atomically
from dense_jax.formatting import table
from dense_jax.outputs import check_file, check_folder, write_json

_EPILOG = """
Runs on one device, on the run's held-out text. Writes analysis.json and analysis.png into the run's
folder. With --record it looks into several runs, such as those of a sweep
(runs/sweeps/depth/*/seed*), and compares the means of those that differ in their seeds: a line for
each run in FILE.jsonl, tables beside it in FILE.md and a picture in FILE.png. A run that is in the
file is not looked into again.
docs/evidence.md says what each figure is, and what it is not.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints a table of the layers, and writes all figures and their picture."""
  command = common.parser("analyze", "Figures of a run's hidden states, layer by layer.")
  command.epilog = _EPILOG
  common.add_checkpoint_arguments(command, several=True)
  command.add_argument("--batches", type=int, default=16, metavar="N",
                       help="batches of the held-out text, spread over it (default 16)")
  command.add_argument("--batch-size", type=int, default=4, metavar="N",
                       help="rows of a batch (default 4)")
  command.add_argument("--length", type=int, default=0, metavar="T",
                       help="tokens of a row; left out, as in training")
  command.add_argument("--samples", type=int, default=1024, metavar="N",
                       help="tokens to take states at, at least 64 (default 1024)")
  command.add_argument("--record", metavar="FILE.jsonl",
                       help="the file that has a line for each run; needed for several runs")
  options = command.parse_args(arguments)
  for name, low in (("batches", 1), ("batch_size", 1), ("length", 0), ("samples", 64)):
    if getattr(options, name) < low:
      raise invalid(f"--{name.replace('_', '-')}", getattr(options, name), f"an integer >= {low}")
  if options.record is not None:
    _compare(options, "dense-jax analyze " + shlex.join(arguments))
    return 0
  if len(options.workdir) > 1:
    raise invalid("--workdir", " ".join(options.workdir), "one folder without --record")
  name, seen, json_file = _look(options, options.workdir[0])
  print(f"{name}: {seen.samples:,} tokens\n\n{table(_rows(seen))}\n\n"
        f"figures   {json_file}\nplot      {json_file.with_suffix('.png')}")
  return 0


def _look(options: argparse.Namespace, workdir: str) -> tuple[str, Seen, epath.Path]:
  """Looks into a run, and writes its figures; returns its name, these, and their file."""
  json_file = check_folder(workdir, "--workdir") / "analysis.json"
  run = runs.restore(workdir, options.checkpoint, options.weights)
  batches = runs.heldout_rows(run, options.batch_size, options.batches, options.length)
  seen = look_into(run.model, batches, samples=options.samples)
  write_json(json_file, {"run": run.name, **seen.as_dict()}, "--workdir")
  plot_seen(seen, json_file.with_suffix(".png"))
  return run.name, seen, json_file


def _compare(options: argparse.Namespace, command: str) -> None:
  """Looks into the runs that the record lacks, and writes tables and a picture of all."""
  record = check_file(options.record, "--record")
  if record.suffix != ".jsonl":
    raise invalid("--record", options.record, "a file whose name ends in .jsonl")
  summaries = read_summaries(record)
  for workdir in tqdm(options.workdir, unit="run", disable=None):
    if whole_path(workdir) not in map(whole_path, summaries):
      name, seen, _ = _look(options, workdir)
      rows = options.batches * options.batch_size
      add_summary(record, summaries, summarize(name, workdir, rows, seen))
  tables, picture = record.with_suffix(".md"), record.with_suffix(".png")
  with locked(record):  # Another process may have added runs, whose tables must not be lost.
    summaries |= read_summaries(record)
    text = markdown(summaries, command)
    write_atomically(tables, text.encode())
    plot_groups(summaries, picture)
  print(f"{text}\nfigures   {record}\ntables    {tables}\nplot      {picture}")


def _rows(seen: Seen) -> list[tuple[str, ...]]:
  """Returns the rows of the table of layers, the header first."""
  rows: list[tuple[str, ...]] = [(
      "layer", "rank of the state", "of the stream", "state from the last layer's, R^2",
      "gradient from the last layer", "without dense paths", "loss if the head follows",
      "share of sources",
  )]
  states = seen.similarity.get("state", {})
  for layer, lens in enumerate(seen.lens):
    shares = [value for name, value in seen.layers[layer].items() if name.endswith("_ratio")]
    rows.append((
        str(layer), _fixed(seen.rank.get("state"), layer), _fixed(seen.rank["residual"], layer),
        _fixed(states.get("probe"), (layer, -1)), _fixed(seen.gradient, (-1, layer)),
        _fixed(seen.cut_gradient, (-1, layer)), f"{lens:.3f}",
        " ".join(f"{share:.2f}" for share in shares),
    ))
  return rows


def _fixed(values: np.ndarray | None, place: int | tuple[int, int]) -> str:
  return "" if values is None else f"{values[place]:.2f}"


if __name__ == "__main__":
  common.run(main)
