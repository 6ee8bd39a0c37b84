"""Tokenizes a run's text into a folder, for machines that do not have the text."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tqdm

from dense_jax import experiment
from dense_jax.cli import common, config_help
from dense_jax.config import invalid
from dense_jax.data import identity, prepared
from dense_jax.data.pipeline import load_datasets
from dense_jax.data.token_store import TokenStore
from dense_jax.files import is_remote, make_path
from dense_jax.formatting import scaled, table

_EPILOG = """
The folder holds the tokenizer, and the text to train on and to hold out, as ids of two or four
bytes. A run trains on it with
  --config.data.path=FOLDER
and has the same rows and the same tokenizer as on the text itself; see docs/data.md.
"""


def main(arguments: Sequence[str]) -> int:
  """Writes the folder, and prints what it holds."""
  command = common.parser("tokenize", "Tokenizes a run's text into a folder that can travel.")
  command.epilog = _EPILOG
  command.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="an experiment, "
                       "whose text, tokenizer and vocabulary are taken")
  command.add_argument("--to", required=True, metavar="FOLDER", help="a new folder")
  command.add_argument("--tokens", type=int, default=0, metavar="N", help="only the first "
                       "documents to train on that have at most N tokens together; left out, all")
  config_help.add_argument(command)
  if config_help.is_asked(arguments):
    return config_help.show(command, arguments)
  options, overrides = common.split_overrides(command, arguments)
  data = experiment.load(options.config, overrides).data
  if options.tokens < 0:
    raise invalid("--tokens", options.tokens, "an integer >= 0")
  if data.task.exists:
    raise invalid("config.data.task.name", data.task.name, "empty: a task's rows need no text")
  folder = _new_folder(options.to)
  with tqdm.tqdm(unit="B", unit_scale=True, desc="tokenizing", leave=False,
                 disable=not sys.stderr.isatty()) as bar:
    found = load_datasets(data, lambda done: bar.update(max(done - bar.n, 0)))
  train, heldout = found.train, found.heldout
  if not isinstance(train, TokenStore) or not isinstance(heldout, TokenStore):
    raise invalid("config.data.path", data.path, "text; this is a corpus, whose folder can travel")
  if options.tokens:
    try:
      train = train.first(options.tokens)
    except ValueError as error:
      raise invalid("--tokens", options.tokens, f"a larger number: {error}") from error
  prepared.write(folder, data, found.tokenizer, train, heldout, identity.describe(found))
  print(table([("part", "documents", "tokens", "text"), *(
      (name, f"{store.num_documents:,}", f"{store.num_tokens:,}", scaled(store.num_bytes, "B"))
      for name, store in (("train", train), ("held out", heldout)))]))
  size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
  print(f"\n{found.tokenizer.vocab_size:,} ids; {scaled(size, 'B')} in {folder}")
  print(f"train with  --config.data.path={folder}")
  return 0


def _new_folder(text: str) -> Path:
  """Returns the folder to write into.

  Raises:
    InputError: it is in a bucket, or holds something already.
  """
  folder = make_path(text, "--to")
  if is_remote(folder):  # Stores are memory-mapped, which a bucket does not allow.
    raise invalid("--to", text, "a local folder")
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise invalid("--to", text, "a new folder; there is something")
  return Path(folder)


if __name__ == "__main__":
  common.run(main)
