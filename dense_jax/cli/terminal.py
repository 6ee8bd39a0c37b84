"""Text that is not ours, on a terminal."""

import re

# What a terminal obeys rather than shows: the control characters but for tabs and line ends (a
# carriage return alone lets a line overwrite itself), and the overrides and isolates that turn
# the direction of what follows them.
_CONTROL = re.compile("\r(?!\n)|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
  """Text from a model, a prompt or data, to be printed: each control character becomes U+FFFD.

  Everything else stays as it is, character by character: spaces of all kinds, joined emoji,
  combining marks, every script. The length stays the same too.
  """
  return _CONTROL.sub("\ufffd", text)
