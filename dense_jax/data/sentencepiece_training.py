"""Trains a SentencePiece model in a separate process; run by `tokenizer_training`.

The trainer is C++ code that no Python signal handler can interrupt. In a separate process it can
be killed; the process also exits by itself when its parent is gone.

Argument: the parent's process id. Standard input: JSON, [sentences, the trainer's options].
Standard output: the model (status 0), or the trainer's error message (status 3).
"""

import io
import json
import signal
import sys

from dense_jax.data.child_process import end_with

REFUSED = 3


def main(parent: int) -> int:
  """Trains a model from standard input to standard output; returns the exit status."""
  # A terminal sends these to parent and child alike; the parent decides what to do.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  end_with(parent)
  import sentencepiece  # After the signal handlers are set, because the import is slow.

  sentences, options = json.load(sys.stdin.buffer)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **options
    )
  except RuntimeError as error:
    sys.stdout.buffer.write(str(error).encode())
    return REFUSED
  sys.stdout.buffer.write(model.getvalue())
  return 0


if __name__ == "__main__":
  sys.exit(main(int(sys.argv[1])))
