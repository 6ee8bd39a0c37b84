"""Text for people: tables, numbers with units, and text that is safe on a terminal."""

import re
from collections.abc import Sequence

from dense_jax.types import Params

# Characters that a terminal obeys instead of showing: control characters except tabs and line ends
# (a carriage return alone lets a line overwrite itself), and the overrides and isolates that change
# the direction of the text after them.
_CONTROL = re.compile("\r(?!\n)|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
  """Replaces each control character in text from a model, a prompt or data by U+FFFD.

  All other characters stay as they are: spaces of all kinds, joined emoji, combining marks, every
  script. The length of the text does not change.
  """
  return _CONTROL.sub("\ufffd", text)


def table(rows: Sequence[Sequence[str]]) -> str:
  """Aligns rows in columns: the first column to the left, all others to the right."""
  widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    first, *others = (cell.ljust(w) if not i else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
    lines.append("  ".join([first, *others]).rstrip())
  return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[object]], numbers: slice = slice(1, None)) -> str:
  """Formats rows as a table in Markdown.

  Args:
    rows: cells, which are put on one line each; the first row is the header.
    numbers: the columns that are aligned to the right.
  """
  header, *body = rows
  rule = ["---"] * len(header)
  rule[numbers] = ["---:"] * len(rule[numbers])
  lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
           for row in (header, rule, *body)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scaled(value: float, unit: str) -> str:
  """Formats a value with three digits and a decimal prefix, such as "4.83 MB"."""
  prefixes = ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"))
  for power, prefix in prefixes:
    if value >= 10**power:
      return f"{value / 10**power:.3g} {prefix}{unit}"
  return f"{value / 1e-6:.3g} u{unit}" if value else f"0 {unit}"


def parameter_table(params: Params) -> str:
  """Tabulates parameters by module; the same module of all layers is one row."""
  sizes: dict[str, int] = {}
  for name, leaf in params.items():
    parts = [part for part in name.split(".") if not part.isdigit()]
    module = ".".join(part for part in parts if part not in ("prefix_layers", "scanned_layers"))
    module = module.removesuffix(".kernel").removesuffix(".scale")
    sizes[module] = sizes.get(module, 0) + leaf.size
  total = sum(sizes.values())
  rows = [("module", "parameters", "share")]
  rows += [(name, f"{size:,}", f"{size / total:.1%}") for name, size in sorted(sizes.items())]
  return table([*rows, ("all", f"{total:,}", f"{1:.1%}")])
