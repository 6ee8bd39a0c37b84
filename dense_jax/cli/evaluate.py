"""Scores a trained run on held-out text."""

import dataclasses
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tqdm

from dense_jax.cli import common, report
from dense_jax.cli.memory import device_memory
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.data.packing import build_store
from dense_jax.data.pipeline import heldout_batches
from dense_jax.data.sources import find, split
from dense_jax.evaluation.perplexity import Evaluator
from dense_jax.outputs import check_file, write_json

_EPILOG = """
The text is read in windows of config.data.seq_len tokens, one after the other, and the state is
cleared at the beginning of each (and of each document): the context is fresh every seq_len tokens,
and a target is predicted from the tokens before it in its own window. A run of longer windows
predicts from more.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints, and with --json writes, held-out loss, perplexity and bits per byte."""
  command = common.parser("evaluate", "Held-out loss, perplexity and bits per byte of a run.")
  command.epilog = _EPILOG
  common.add_checkpoint_arguments(command)
  command.add_argument("--text", help="score this text (a file, directory or glob) instead of the "
                       "run's own held-out text")
  command.add_argument("--batch-size", type=int, default=16,
                       help="windows at a time (default 16); more than there are take all")
  command.add_argument("--json", metavar="FILE", help="write the figures there; one that is not "
                       "finite is null")
  options = command.parse_args(arguments)
  if options.batch_size < 1:
    raise invalid("--batch-size", options.batch_size, "an integer >= 1")
  file = None if options.json is None else check_file(options.json, "--json")
  other_text = None if options.text is None else find(options.text, "--text")

  run = common.restore(options.workdir, options.checkpoint)
  config = run.config
  source = split(config.data)[1] if other_text is None else dataclasses.replace(
      other_text, cache_dir=config.data.cache_dir
  )
  store = build_store(source, run.tokenizer, config.data.cache_dir)
  windows = store.num_windows(config.data.seq_len)
  batch_size = min(options.batch_size, windows)  # A row without a window is only padding.
  _check_memory(config, batch_size)
  batches = heldout_batches(store, config.data.seq_len, batch_size)
  total = -(-windows // batch_size)
  bar = tqdm.tqdm(batches, total=total, unit="batch", disable=not sys.stderr.isatty())
  evaluator = Evaluator(run.model, chunk=config.train.loss_chunk)
  held_out = evaluator(run.params, bar, jax.device_put)
  bits = held_out.bits_per_byte(report.targets_per_byte(store))
  print(f"step {run.step}: {report.perplexity_line(held_out, bits)}")
  if file is not None:
    figures = {
        "step": run.step,
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": bits,
        "targets": held_out.targets,
        "bytes": store.num_bytes,
        "window": held_out.window,
        "context": held_out.context,
    }
    write_json(file, figures, "--json")
  return 0


def _check_memory(config: ExperimentConfig, batch_size: int) -> None:
  """Refuses windows of which not even one layer's activations fit."""
  row = config.data.seq_len * config.model.width * jnp.dtype(config.model.dtype).itemsize
  needed, available = batch_size * row, device_memory()
  if needed > available:
    raise invalid(
        "--batch-size", batch_size, f"at most {available // row}: one layer's activations take "
        f"{common.scaled(needed, 'B')}, and there are {common.scaled(available, 'B')}",
    )


if __name__ == "__main__":
  common.run(main)
