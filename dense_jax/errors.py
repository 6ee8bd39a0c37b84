"""`InputError`, the one exception for wrong user input, and its hints; and `DivergedError`."""

import difflib
import pathlib
import traceback
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


def raised_by(error: Exception, file: pathlib.Path, module: str) -> InputError:
  """Returns an error that names the line of a user's file that raised an exception.

  Args:
    error: the exception.
    file: the file that was run.
    module: what the names of the modules of such files begin with: of those that the exception
      passed, the innermost line is named.
  """
  lines = [
      f"{frame.f_code.co_filename}:{line}"
      for frame, line in traceback.walk_tb(error.__traceback__)
      if frame.f_globals.get("__name__", "").startswith(module)
  ]
  place, what = lines[-1] if lines else str(file), str(error)
  if isinstance(error, SyntaxError) and error.filename:
    place, what = f"{error.filename}:{error.lineno}", error.msg
  return InputError(f"{place}: {type(error).__name__}: {what}")
