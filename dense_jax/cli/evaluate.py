"""Scores a trained run on held-out text."""

from collections.abc import Sequence

from dense_jax import runs
from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.data.sources import find
from dense_jax.outputs import check_file, write_json

_EPILOG = """
The text is read in windows of config.data.seq_len tokens, one after the other, and the state is
cleared at the beginning of each (and of each document): the context is fresh every seq_len tokens,
and a target is predicted from the tokens before it in its own window. A run of longer windows
predicts from more.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints held-out loss, perplexity and bits per byte and, with --json, writes them."""
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
  text = None if options.text is None else find(options.text, "--text")

  run = runs.restore(options.workdir, options.checkpoint)
  score = runs.evaluate_run(run, text, batch_size=options.batch_size)
  held_out = score.held_out
  print(f"step {run.step}: {held_out.describe(score.bits_per_byte)}")
  if file is not None:
    figures = {
        "step": run.step,
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "targets": held_out.targets,
        "bytes": score.num_bytes,
        "window": held_out.window,
        "context": held_out.context,
    }
    write_json(file, figures, "--json")
  return 0


if __name__ == "__main__":
  common.run(main)
