"""Finds the instructions, and the lines of code, that move the most bytes of a program."""

import dataclasses
from collections.abc import Sequence

from dense_jax.costs.hlo import Item


@dataclasses.dataclass(frozen=True)
class Entry:
  """An instruction, or all instructions of one line of code in one pass.

  Attributes:
    bytes: the bytes of main memory that all its runs move.
    runs: how often it runs; for a line, all its instructions together.
    phase: "forward", "again" (recomputed in the backward pass) or "backward".
    lines: the innermost line of code, and the next one outward in another file; libraries' lines
      are left out.
    what: the instruction's name, shape and jax operation; "" for a line of code.
  """

  bytes: int
  runs: int
  phase: str
  lines: str
  what: str = ""


# Parts of the scopes that gradients and rematerialisation add to an operation's name.
_MARKS = ("transpose(", "jvp(", "rematted_computation")


def instructions(items: Sequence[Item], count: int) -> list[Entry]:
  """Returns the `count` instructions that move the most bytes, the largest first."""
  largest = sorted(items, key=_bytes, reverse=True)[:count]
  return [
      Entry(_bytes(item), item.times, _phase(item), _lines(item), _what(item)) for item in largest
  ]


def lines(items: Sequence[Item], count: int) -> list[Entry]:
  """Returns the `count` lines of code whose instructions move the most bytes, the largest first."""
  found: dict[tuple[str, str], Entry] = {}
  for item in items:
    key = _phase(item), _lines(item)
    before = found.get(key, Entry(0, 0, *key))
    found[key] = dataclasses.replace(
        before, bytes=before.bytes + _bytes(item), runs=before.runs + item.times
    )
  return sorted(found.values(), key=lambda entry: entry.bytes, reverse=True)[:count]


def _bytes(item: Item) -> int:
  return round(item.cost.bytes_accessed) * item.times


def _phase(item: Item) -> str:
  """Returns the pass; a forward pass inside a backward one computes again."""
  scopes = item.op_name.split("/")
  told = [scope for scope in scopes if any(mark in scope for mark in _MARKS)]
  if not told or not any("transpose(" in scope for scope in told):
    return "forward"
  return "backward" if "transpose(" in told[-1] else "again"


def _lines(item: Item) -> str:
  """Returns the lines of an item for a table; "" if no line is known."""
  ours = [line for line in item.lines if "/site-packages/" not in line and "<" not in line]
  if not ours:
    return ""
  file = ours[0].rpartition(":")[0]
  outer = next((line for line in ours if line.rpartition(":")[0] != file), "")
  return " < ".join(_short(line) for line in (ours[0], outer) if line)


def _short(line: str) -> str:
  """Returns the last two parts of a line's path."""
  return "/".join(line.split("/")[-2:])


def _what(item: Item) -> str:
  shape = item.instruction.shape
  parts = [f"{leaf.dtype}{list(leaf.dims)}".replace(" ", "") for leaf in shape.leaves if leaf.dims]
  operation = "/".join(item.op_name.split("/")[-2:])
  return f"{item.instruction.name} {' '.join(parts[:2])} {operation}".strip()
