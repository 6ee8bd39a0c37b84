"""Tasks of formal languages: ListOps, parity and Dyck."""

from collections.abc import Callable

import numpy as np

from dense_jax.data.synthetic.row import Random, Row

FIRST_DIGIT, FIRST_OPERATOR, CLOSE, EQUALS = 1, 11, 15, 16
"""Ids of ListOps: the digit 0, the first of `OPERATORS`, a list's end, and the question."""
_PART_OF_OPERATORS = 0.25
_DRAWN_AT_A_TIME = 1024


def _median(values: list[int]) -> int:
  ordered, middle = sorted(values), len(values) // 2
  if len(values) % 2:
    return ordered[middle]
  return (ordered[middle - 1] + ordered[middle]) // 2  # Half a number is cut off.


OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min, "[MAX": max, "[MED": _median, "[SM": lambda values: sum(values) % 10,
}


class _Expressions:
  """Random expressions of ListOps, as lists of ids."""

  def __init__(self, random: Random, length: int, most_arguments: int, max_depth: int) -> None:
    self._random, self._length = random, length
    self._most_arguments, self._max_depth = most_arguments, max_depth
    self._numbers: list[float] = []
    self.ids: list[int] = []

  def _draw(self, count: int) -> int:
    """Draws one of 0 to count - 1."""
    return int(self._uniform() * count)

  def _uniform(self) -> float:
    if not self._numbers:
      self._numbers = self._random.random_sample(_DRAWN_AT_A_TIME).tolist()
    return self._numbers.pop()

  def make(self, depth: int = 1) -> int | None:
    """Adds an expression to `ids`; returns its value, or None if they are too many."""
    if depth >= self._max_depth or self._uniform() > _PART_OF_OPERATORS:
      value = self._draw(10)
      self.ids.append(FIRST_DIGIT + value)
      return value
    operator = self._draw(len(OPERATORS))
    self.ids.append(FIRST_OPERATOR + operator)
    values: list[int] = []
    for _ in range(2 + self._draw(self._most_arguments - 1)):
      found = self.make(depth + 1)
      if found is None or len(self.ids) >= self._length:
        return None
      values.append(found)
    self.ids.append(CLOSE)
    return list(OPERATORS.values())[operator](values)


def listops(random: Random, length: int, most_arguments: int, max_depth: int) -> Row:
  """Makes a row of ListOps, as the generator of Long Range Arena does (arXiv 2011.04006).

  The row is an expression such as [MAX 4 [MIN 2 3 ] 0 ] and the question, at which the value, a
  digit, is the target. A node is a digit with a probability of 3/4, and always at the greatest
  depth; else it is an operator with 2 or more arguments, as likely as not to have each number of
  them. Expressions have more than T/4 tokens and fewer than T, others are drawn anew. The published
  parameters are T = 2000, at most 10 arguments and a depth of 10.

  Args:
    random: where numbers are drawn from.
    length: T, the most tokens of the row, which may be shorter; at least 5.
    most_arguments: of an operator; at least 2.
    max_depth: nodes from the root to a digit; at least 2.
  """
  while True:
    expressions = _Expressions(random, length, most_arguments, max_depth)
    value = expressions.make()
    if value is not None and length // 4 < len(expressions.ids) < length:
      break
  row = Row.of(np.asarray([*expressions.ids, EQUALS]))
  row.targets[-1] = FIRST_DIGIT + value
  return row


def parity(random: Random, length: int) -> Row:
  """Makes a row of random bits (ids 1 and 2); each target is the parity of the bits so far.

  To answer at every bit is the form in which state tracking is studied (arXiv 2404.08819).
  """
  bits = random.randint(2, size=length)
  return Row(1 + bits, 1 + np.cumsum(bits) % 2)


def dyck(random: Random, length: int, kinds: int, max_depth: int) -> Row:
  """Makes a row of Dyck-(k, m), balanced brackets of k kinds and depth m (arXiv 2010.07515).

  Brackets open or close with equal probability where both are possible. Where the next bracket
  closes, it is the target: the kind of the last one that is open. Ids are 1 to k for opening
  brackets, and then as many for closing ones.

  Args:
    random: where numbers are drawn from.
    length: T, tokens of the row; at least `max_depth`. The row may end within brackets.
    kinds: k.
    max_depth: m.
  """
  opens = random.random_sample(length + 1) < 0.5
  drawn = random.randint(kinds, size=length + 1)
  brackets = np.empty(length + 1, int)
  stack: list[int] = []
  for place in range(length + 1):
    if not stack or (opens[place] and len(stack) < max_depth):
      stack.append(1 + drawn[place])
      brackets[place] = stack[-1]
    else:
      brackets[place] = kinds + stack.pop()
  row = Row.of(brackets[:-1])
  closes = brackets[1:] > kinds
  row.targets[closes] = brackets[1:][closes]
  return row
