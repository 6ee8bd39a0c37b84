"""Looks into a run's layers: what their states share, what is lost with depth, who reads what."""

from collections.abc import Sequence

import numpy as np

from dense_jax import runs
from dense_jax.analysis.model import Seen, look_into
from dense_jax.analysis.plot import plot_seen
from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.outputs import check_file, write_json
from dense_jax.runs.formatting import table

_EPILOG = """
Runs on one device, on the run's held-out text. Writes analysis.json and analysis.png into the run's
folder. docs/evidence.md says what each figure is, and what it is not.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints a table of the layers, and writes all figures and their picture."""
  command = common.parser("analyze", "Figures of a run's hidden states, layer by layer.")
  command.epilog = _EPILOG
  common.add_checkpoint_arguments(command)
  command.add_argument("--batches", type=int, default=16, metavar="N",
                       help="batches of the held-out text, spread over it (default 16)")
  command.add_argument("--batch-size", type=int, default=4, metavar="N",
                       help="rows of a batch (default 4)")
  command.add_argument("--length", type=int, default=0, metavar="T",
                       help="tokens of a row; left out, as in training")
  command.add_argument("--samples", type=int, default=1024, metavar="N",
                       help="tokens to take states at, at least 64 (default 1024)")
  options = command.parse_args(arguments)
  for name, low in (("batches", 1), ("batch_size", 1), ("length", 0), ("samples", 64)):
    if getattr(options, name) < low:
      raise invalid(f"--{name.replace('_', '-')}", getattr(options, name), f"an integer >= {low}")
  json_file = check_file(f"{options.workdir}/analysis.json", "--workdir")
  run = runs.restore(options.workdir, options.checkpoint, options.weights)
  batches = runs.heldout_rows(run, options.batch_size, options.batches, options.length)
  seen = look_into(run.model, batches, samples=options.samples)
  write_json(json_file, {"run": run.name, **seen.as_dict()}, "--workdir")
  picture = json_file.with_suffix(".png")
  plot_seen(seen, picture)
  print(f"{run.name}: {seen.samples:,} tokens\n\n{table(_rows(seen))}\n\n"
        f"figures   {json_file}\nplot      {picture}")
  return 0


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
