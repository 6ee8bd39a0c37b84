"""Scores a trained run on held-out text."""

import json
import sys
from collections.abc import Sequence

import jax
import tqdm

from dense_jax.cli import common, report
from dense_jax.config import invalid
from dense_jax.data.packing import build_store
from dense_jax.data.pipeline import heldout_batches
from dense_jax.data.sources import find, split
from dense_jax.evaluation.perplexity import Evaluator
from dense_jax.files import make_path, write_atomically


def main(arguments: Sequence[str]) -> int:
  """Prints, and with --json writes, held-out loss, perplexity and bits per byte."""
  command = common.parser("evaluate", "Held-out loss, perplexity and bits per byte of a run.")
  common.add_checkpoint_arguments(command)
  command.add_argument("--text", default="", help="score this text (a file, directory or glob) "
                       "instead of the run's own held-out text")
  command.add_argument("--batch-size", type=int, default=16, help="rows at a time (default 16)")
  command.add_argument("--json", default="", metavar="FILE", help="write the figures there")
  options = command.parse_args(arguments)
  if options.batch_size < 1:
    raise invalid("--batch-size", options.batch_size, "an integer >= 1")

  run = common.restore(options.workdir, options.checkpoint)
  config = run.config
  source = find(options.text, "--text") if options.text else split(config.data)[1]
  store = build_store(source, run.tokenizer, config.data.cache_dir)
  batches = heldout_batches(store, config.data.seq_len, options.batch_size)
  total = -(-store.num_windows(config.data.seq_len) // options.batch_size)
  bar = tqdm.tqdm(batches, total=total, unit="batch", disable=not sys.stderr.isatty())
  evaluator = Evaluator(run.model, chunk=config.train.loss_chunk)
  held_out = evaluator(run.params, bar, jax.device_put)
  bits = held_out.bits_per_byte(report.targets_per_byte(store))
  print(f"step {run.step}: {report.perplexity_line(held_out, bits)}")
  if options.json:
    figures = {
        "step": run.step,
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": bits,
        "targets": held_out.targets,
        "bytes": int(store.num_bytes),
    }
    text = json.dumps(figures, indent=2) + "\n"
    write_atomically(make_path(options.json, "--json"), text.encode())
  return 0


if __name__ == "__main__":
  common.run(main)
