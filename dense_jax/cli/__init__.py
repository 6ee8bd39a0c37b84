"""Command lines: argument parsing and printing around what the package does."""

import sys

from dense_jax import interrupt

# `python -m dense_jax.cli.X` imports this first, with "-m" in place of the command's name. What
# it imports next takes seconds, in which a signal should not end in a traceback.
if sys.argv[:1] == ["-m"]:
  interrupt.open_closed_streams()
  interrupt.end_early()
