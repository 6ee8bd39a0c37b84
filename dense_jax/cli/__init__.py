"""Command lines, which parse arguments and print, around the rest of the package."""

import pathlib
import sys

from dense_jax import interrupt

CONSOLE_COMMAND = "dense-jax"


def is_console_command() -> bool:
  """Returns whether the process began as `dense-jax ...`, not as `python -m dense_jax.cli.X`."""
  return bool(sys.argv) and pathlib.Path(sys.argv[0]).stem == CONSOLE_COMMAND


# Both `python -m dense_jax.cli.X` (where sys.argv[0] is still "-m") and `dense-jax X` import this
# module first. Their other imports take seconds, in which a signal should not end in a traceback.
if sys.argv[:1] == ["-m"] or is_console_command():
  interrupt.open_closed_streams()
  interrupt.end_early()
