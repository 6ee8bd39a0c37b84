"""Token sequences as a tree, so that a prefix that several of them share is read once.

A few-shot prompt that all questions share is one edge, each question below it is another, and the
options of the question are the leaves. The tree of a set of sequences does not depend on their
order.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

# A prefix is read apart if it has at least this many tokens, and if that saves at least so many
# tokens and this part of those of the sequences that share it. Less is lost again in padding.
SHORTEST_SHARED, FEWEST_SAVED, LEAST_SAVED = 8, 32, 0.35
# Edges from the root to a leaf, at most. The states of one batch of each level are held at a time.
MAX_LEVELS = 16


@dataclasses.dataclass(frozen=True)
class Span:
  """Consecutive targets of one sequence that are predicted from tokens of one edge.

  Attributes:
    sequence: the sequence's number.
    place: the index in the sequence of the token that predicts the first of them.
    targets: int32 [K].
  """

  sequence: int
  place: int
  targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Edge:
  """Tokens that are read in one go, from the state after the edges above.

  Attributes:
    start: the number of tokens above, which is the position of the first token here.
    tokens: int32 [T], T >= 1.
    spans: the targets to score here.
    children: the edges that go on from the state after these tokens; none at a leaf.
  """

  start: int
  tokens: np.ndarray
  spans: list[Span] = dataclasses.field(default_factory=list)
  children: list["Edge"] = dataclasses.field(default_factory=list)


def build_tree(
    inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray], *, share: bool = True
) -> list[Edge]:
  """Returns the edges at the root.

  Args:
    inputs: int32 [N >= 1] each, the tokens to read.
    targets: int32 [K >= 1] each. The last K tokens of the input predict them.
    share: false gives each sequence an edge of its own.
  """
  # Big-endian bytes sort as the ids do: a prefix comes before what it is a prefix of.
  keys = [(tokens.astype(">u4").tobytes(), wanted.tobytes())
          for tokens, wanted in zip(inputs, targets, strict=True)]
  order = sorted(range(len(inputs)), key=keys.__getitem__)
  rows = [inputs[i] for i in order]
  shared = [_common(left, right) if share else 0 for left, right in itertools.pairwise(rows)]
  roots: list[Edge] = []
  # Ranges of rows that share their first `depth` tokens, and the edges that they become.
  ranges = [(0, len(rows), 0, 1, roots)] if rows else []
  while ranges:
    low, high, depth, level, edges = ranges.pop()
    if high - low == 1:
      edges.append(_edge(rows, targets, order, low, high, depth, len(rows[low])))
      continue
    common = min(shared[low : high - 1])
    if level < MAX_LEVELS and _worth(rows[low:high], depth, common):
      edge = _edge(rows, targets, order, low, high, depth, common)
      edges.append(edge)
      edges, depth, level = edge.children, common, level + 1
    first = low
    for index in range(low, high):
      if index == high - 1 or shared[index] == common:
        if len(rows[first]) > depth:  # Else it ends with the edge above.
          ranges.append((first, index + 1, depth, level, edges))
        first = index + 1
  return roots


def _common(left: np.ndarray, right: np.ndarray) -> int:
  """Returns the number of first tokens that two sequences share."""
  length = min(len(left), len(right))
  different = np.flatnonzero(left[:length] != right[:length])
  return int(different[0]) if len(different) else length


def _worth(rows: Sequence[np.ndarray], depth: int, common: int) -> bool:
  """Returns whether to read tokens `depth` to `common` of these rows once."""
  total = sum(len(row) - depth for row in rows)
  saved = (len(rows) - 1) * (common - depth)
  return common - depth >= SHORTEST_SHARED and saved >= max(FEWEST_SAVED, LEAST_SAVED * total)


def _edge(
    rows: Sequence[np.ndarray], targets: Sequence[np.ndarray], order: Sequence[int],
    low: int, high: int, start: int, end: int,
) -> Edge:
  """Makes the edge of tokens `start` to `end` of rows `low` to `high`, with their targets there."""
  edge = Edge(start, rows[low][start:end])
  for row, sequence in zip(rows[low:high], order[low:high], strict=True):
    wanted = targets[sequence]
    first = len(row) - len(wanted)
    place, stop = max(first, start), min(len(row), end)
    if place < stop:
      edge.spans.append(Span(sequence, place, wanted[place - first : stop - first]))
  return edge
