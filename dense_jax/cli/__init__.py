"""Command lines: argument parsing and printing around what the package does."""

import pathlib
import sys

from dense_jax import interrupt

CONSOLE_COMMAND = "dense-jax"


def is_console_command() -> bool:
  """Whether the process was begun as `dense-jax ...`, not as `python -m dense_jax.cli.X ...`."""
  return bool(sys.argv) and pathlib.Path(sys.argv[0]).stem == CONSOLE_COMMAND


# `python -m dense_jax.cli.X` imports this first, with "-m" in place of the command's name, and so
# does `dense-jax X`. What they import next takes seconds, in which a signal should not end in a
# traceback.
if sys.argv[:1] == ["-m"] or is_console_command():
  interrupt.open_closed_streams()
  interrupt.end_early()
