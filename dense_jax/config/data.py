"""Text, tokens and rows: `config.data`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import choice, group, integer, text
from dense_jax.config.mixture import VALID as MIXTURE
from dense_jax.config.mixture import Mixture, parse_mixtures
from dense_jax.config.task import TaskConfig

_TEXT = "a file, directory or glob of .txt, .jsonl, .jsonl.gz, .jsonl.zst"
_TOKENIZED = "a folder that `dense-jax tokenize` or `dense-jax prepare` wrote"


@dataclasses.dataclass(frozen=True)
class DataConfig(Config, key="config.data"):
  """Text, tokens and batches.

  A .txt file is one document of at most 1 GiB. A .jsonl file has one document of at most 128 MiB in
  the `text` field of each line. In directories and globs, names that begin with a dot are skipped,
  links are followed, and each real file is read once. Text is UTF-8, or UTF-16 or UTF-32 with a
  byte order mark.

  With format=responses, each line of a .jsonl file is an example to fine-tune on: strings `prompt`
  and `response`, or a chat as `messages`, a list of {"role": "user", "content": "..."} with the
  roles system, user and assistant. The loss counts the responses, or the assistant's messages, and
  the eos after each; bits per byte divide by their bytes.
  """

  path: str = text(
      "stdlib", f"stdlib, or {_TEXT}, or {_TOKENIZED}",
      help="text to train on, here or in a bucket (gs://BUCKET/...); stdlib means the sources of "
      "Python's standard library")
  heldout_path: str = text(
      "", f"empty, or {_TEXT}", help="held-out text; empty holds out a part of path")
  heldout_every: int = integer(
      20, 2, help="every n-th file is held out; of fewer than n files every n-th document; of "
      "fewer than n documents the last 1/n of the text")
  format: str = choice(
      "text", "text", "responses",
      help="text trains on every token of plain text; responses trains on the responses in .jsonl "
      "files of prompt and response, or of chat messages")
  template: str = text(
      "plain", "plain, dialogue, instruction, chatml, or a text with {prompt} in it once",
      help="with format=responses, the text around a prompt: plain adds nothing, dialogue writes "
      "User: and Assistant:, instruction ### Instruction: and ### Response:, chatml ChatML's "
      "tokens; or a text of your own, such as 'Q: {prompt}\\nA:'")
  seq_len: int = integer(256, 1, help="T: tokens of a row")
  packing: str = choice(
      "stream", "stream", "best_fit",
      help="how documents fill the rows to train on: stream cuts one stream of all documents into "
      "rows; best_fit keeps documents whole where they fit into a row, and pads. Held-out rows "
      "are those of stream")
  mixture: str = text(
      "", MIXTURE, help="shares of the parts of a corpus that `dense-jax prepare` wrote, in rows, "
      "and from which steps on they hold; empty takes each row of the whole corpus once an epoch")
  workers: int = integer(
      0, 0, 256, help="processes that read and pack rows ahead of training; 0 means a thread of "
      "the training process. The batches are the same")
  tokenizer: str = text(
      "train", "train, bytes, the path of a SentencePiece .model file or of a tokenizer.json, or a "
      "folder that holds one",
      help="train means SentencePiece, trained on the training text and cached; bytes means one "
      "token for each byte; or a file or folder, for a tokenizer.json with the extra hf")
  vocab_size: int = integer(4096, 300, help="pieces of a tokenizer that is trained")
  cache_dir: str = text(
      "~/.cache/dense_jax", "a local directory",
      help="where trained tokenizers, tokenized text and digests of text files are kept between "
      "runs")
  task: TaskConfig = group(TaskConfig, help="a synthetic task in the place of text; docs/data.md")

  def mixtures(self) -> tuple[Mixture, ...]:
    """Returns the mixtures that `mixture` spells, by increasing step; () for an empty text.

    Raises:
      InputError: it is not valid.
    """
    return parse_mixtures(self.mixture)
