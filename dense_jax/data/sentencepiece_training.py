"""Trains a SentencePiece model in a process of its own; run by `tokenizer.train_sentencepiece`.

The trainer is C++ that cannot be stopped and that hears no signal. In a process of its own it can
be killed, and it ends by itself when its parent is gone.

Argument: the parent's process id. Standard input: JSON, [sentences, the trainer's options].
Standard output: the model (status 0), or what the trainer has against the text (status 3).
"""

import io
import json
import os
import signal
import sys
import threading
import time

REFUSED = 3
_POLL_SECONDS = 0.2


def _end_with_parent(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(_POLL_SECONDS)
  os._exit(1)


def main(parent: int) -> int:
  """Trains; returns the process's status."""
  # A terminal sends these to parent and child alike; the parent decides.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
  import sentencepiece  # After the signals, as it takes a while.

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
