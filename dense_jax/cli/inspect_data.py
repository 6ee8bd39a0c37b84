"""Shows a run's data, as text and as a picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tqdm

from dense_jax import experiment
from dense_jax.cli import common, config_help
from dense_jax.config import LARGEST, invalid
from dense_jax.data.corpus.opening import Corpus, is_corpus
from dense_jax.data.pipeline import load_datasets
from dense_jax.files import make_path
from dense_jax.formatting import scaled
from dense_jax.outputs import check_file
from dense_jax.runs.inspecting import batch_of, describe_batch, describe_stores, draw_batch
from dense_jax.runs.memory import check_batch, host_memory


def main(arguments: Sequence[str]) -> int:
  """Prints what the data are and what a batch holds, and draws the batch."""
  command = common.parser("inspect_data", "Shows documents, rows and the batch of a step.")
  command.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="an experiment, "
                       "whose data are shown")
  command.add_argument("--step", type=int, default=0, metavar="K", help="the step whose batch is "
                       "shown, from 0 on (0)")
  command.add_argument("--rows", type=int, default=4, metavar="N", help="rows of it that are shown "
                       "as text (4)")
  command.add_argument("--image", default="", metavar="FILE.png", help="draw the batch: segments, "
                       "places without a target, padding")
  command.add_argument("--verify", action="store_true", help="read all of a corpus that `dense-jax "
                       "prepare` wrote, and compare it with the digests in its manifest")
  config_help.add_argument(command)
  if config_help.is_asked(arguments):
    return config_help.show(command, arguments)
  options, overrides = common.split_overrides(command, arguments)
  for name in ("step", "rows"):
    if not 0 <= getattr(options, name) <= LARGEST:
      raise invalid(f"--{name}", getattr(options, name), f"an integer >= 0 and <= {LARGEST}")
  config = experiment.load(options.config, overrides)
  check_batch(config, host_memory())
  corpus = Path(make_path(config.data.path, "config.data.path"))
  if options.verify and not is_corpus(corpus):
    raise invalid("config.data.path", config.data.path, "with --verify, a folder that "
                  "`dense-jax prepare` wrote")
  image = check_file(options.image, "--image") if options.image else None
  with tqdm.tqdm(unit="B", unit_scale=True, desc="tokenizing", leave=False,
                 disable=not sys.stderr.isatty()) as bar:
    data = load_datasets(config.data, lambda done: bar.update(max(done - bar.n, 0)))
  if options.verify:
    size = Corpus(corpus).verify()
    print(f"all shards are as they were written: {scaled(size, 'B')}\n")
  print(describe_stores(config, data))
  batch, parts = batch_of(config, data, options.step)
  print(f"\nthe batch of step {options.step}: "
        + describe_batch(batch, parts, data.tokenizer, options.rows))
  if image is not None:
    draw_batch(batch, image)
    print(f"\ndrawn in {image}")
  return 0


if __name__ == "__main__":
  common.run(main)
