"""Trains a SentencePiece model in a process of its own; run by `tokenizer.train_sentencepiece`.

The trainer is C++ that cannot be stopped and that hears no signal. In a process of its own it can
be killed, and it ends by itself when its parent is gone.

Standard input: one line of JSON, [sentences, the trainer's options], and then nothing until the
parent ends or has its answer. Standard output: the model (status 0), or what the trainer
has against the text (status 3).
"""

import io
import json
import os
import signal
import sys
import threading

REFUSED = 3


def _end_with_parent() -> None:
  sys.stdin.buffer.read()  # Returns when the parent's end of the pipe is closed.
  os._exit(1)


def main() -> int:
  """Trains; returns the process's status."""
  # A terminal sends these to parent and child alike; the parent decides.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  import sentencepiece  # After the signals, as it takes a while.

  sentences, options = json.loads(sys.stdin.buffer.readline())
  threading.Thread(target=_end_with_parent, daemon=True).start()
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
  status = main()
  sys.stdout.flush()
  os._exit(status)  # The thread waits for a parent that waits for the end.
