"""Parsing of Python's own files, which on Python 3.11 takes care."""

import ast
import gc


def parse(text: str) -> ast.Module:
  """Returns `ast.parse(text)`, without collecting garbage in the midst of it.

  Garbage of a failed read, such as orbax's coroutines of a damaged checkpoint, prints a traceback
  when it is collected. Python 3.11 parses the line to print that, and `ast.parse` in one
  `ast.parse` ends the outer one with a SystemError.
  """
  enabled = gc.isenabled()
  gc.disable()
  try:
    return ast.parse(text)
  finally:
    if enabled:
      gc.enable()
