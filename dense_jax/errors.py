"""`InputError`, the one exception for wrong user input, its hint; and `DivergedError`."""

import difflib
from collections.abc import Collection


class InputError(ValueError):
  """Wrong user input, such as a config value, a path or a file's content.

  The message names the field, its value and what would be valid. Every command prints it without a
  traceback and exits with status 2.
  """


class DivergedError(RuntimeError):
  """A run that cannot go on by itself, because its numbers go wrong again and again.

  The message says where. Every command prints it without a traceback and exits with status 3, on
  which no launcher starts the run again.
  """


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
  """Returns how a sentence about an unknown name ends.

  Args:
    name: the unknown name.
    known: the names that exist.
    prefix: what stands before the nearest name in the sentence.

  Returns:
    "; did you mean ...?" with the nearest known name, or "." if none is near.
  """
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f"; did you mean {prefix}{near[0]}?" if near else "."
