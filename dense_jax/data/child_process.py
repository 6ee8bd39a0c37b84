"""Ends a child process with its parent, however that ends: a killed one can tell nobody."""

import os
import threading
import time

_POLL_SECONDS = 0.2


def end_with(parent: int) -> None:
  """Begins to watch for the end of the parent, a process id, and ends this process after it."""
  threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(_POLL_SECONDS)
  os._exit(1)
