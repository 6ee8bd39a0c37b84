"""Tasks of recall: MQAR, selective copying, induction heads and a passkey."""

import numpy as np

from dense_jax.data.synthetic.row import BLANK, Random, Row

TRIGGER = 1
"""The id of the induction task that precedes the tokens to copy."""
FIRST_DIGIT, KEY, ASK, FILLER = 1, 11, 12, 13
"""Ids of the passkey task: the digit 0, "the passkey is", "which is the passkey?", first filler."""


def mqar(
    random: Random, length: int, vocab_size: int, pairs: int, *, power_a: float = 0.01,
    random_non_queries: bool = True,
) -> Row:
  """Makes a row of multi-query associative recall (Zoology, arXiv 2312.04927).

  Pairs of a key and its value come first. Later, each key comes once more, and its value is the
  target there. Keys are of the ids 1 to V/2 - 1, values of V/2 to V - 1, none twice. A key comes
  again at an even distance from the pairs' end, in slot g = 1, 2, ... with a weight of
  g^(power_a - 1).

  Args:
    random: where numbers are drawn from.
    length: T, tokens of the row; at least 4 for each pair.
    vocab_size: V, at least 2 for each pair and 2 more.
    pairs: the number of pairs.
    power_a: the exponent of the weights, plus 1; 1 draws all slots alike.
    random_non_queries: whether the ids in the other places are drawn from all V, instead of 0.
  """
  half, context = vocab_size // 2, 2 * pairs
  keys = 1 + random.choice(half - 1, pairs, replace=False)
  values = half + random.choice(vocab_size - half, pairs, replace=False)
  weights = np.arange(1, (length - context) // 2 + 1) ** (power_a - 1)
  slots = random.choice(len(weights), pairs, replace=False, p=weights / weights.sum())
  row = Row.of(np.full(length, BLANK))
  row.tokens[0:context:2], row.tokens[1:context:2] = keys, values
  row.tokens[context + 2 * slots], row.targets[context + 2 * slots] = keys, values
  if random_non_queries:
    others = np.flatnonzero(row.tokens == BLANK)
    row.tokens[others] = random.randint(vocab_size, size=len(others))
  return row


def copying(random: Random, length: int, vocab_size: int, size: int) -> Row:
  """Makes a row of selective copying (Mamba, arXiv 2312.00752, section 4.1.1).

  Tokens of the ids 1 to V - 2 stand at random places among noise (id 0). Then as many markers
  (id V - 1) follow, at which the tokens are the targets, in order.

  Args:
    random: where numbers are drawn from.
    length: T, tokens of the row with its markers; at least 2 for each token to copy.
    vocab_size: V, at least 3.
    size: the number of tokens to copy.
  """
  row = Row.of(np.full(length, BLANK))
  copied = random.randint(1, vocab_size - 1, size=size)
  row.tokens[np.sort(random.choice(length - size, size, replace=False))] = copied
  row.tokens[length - size :] = vocab_size - 1
  row.targets[length - size :] = copied
  return row


def induction(random: Random, length: int, vocab_size: int, size: int) -> Row:
  """Makes a row of induction heads (Mamba, arXiv 2312.00752, section 4.1.1).

  Among random tokens (ids 2 to V - 1) a trigger (id 1) stands in one place. It comes again at the
  row's end, and the targets are the tokens that followed it the first time.

  Args:
    random: where numbers are drawn from.
    length: T, tokens of the row; more than 1 + 2 * size.
    vocab_size: V, at least 4.
    size: the number of tokens to copy, 1 in the paper; all but the last of them are inputs too.
  """
  row = Row.of(random.randint(TRIGGER + 1, vocab_size, size=length))
  again = length - size
  place = random.randint(again - (1 + size))
  row.tokens[place] = row.tokens[again] = TRIGGER
  copied = row.tokens[place + 1 : place + 1 + size]
  row.tokens[again + 1 :] = copied[:-1]
  row.targets[again:] = copied
  return row


def passkey(random: Random, length: int, vocab_size: int, size: int, depth: float) -> Row:
  """Makes a row of passkey retrieval (arXiv 2305.16300, section 4.2), in ids instead of English.

  The passkey's digits are said twice in a row, amid filler that repeats itself. At the end comes
  the question, and the targets are the digits; all but the last of them are inputs too.

  Args:
    random: where numbers are drawn from.
    length: T, tokens of the row; at least 3 * size + 2.
    vocab_size: V, at least 14; the ids from 13 on are the filler's.
    size: the number of digits.
    depth: the part of the filler that comes before the passkey, from 0 to 1; below 0 it is drawn.
  """
  digits = FIRST_DIGIT + random.randint(10, size=size)
  room = length - (3 * size + 2)
  before = random.randint(room + 1) if depth < 0 else round(depth * room)
  filler = FILLER + np.arange(room) % (vocab_size - FILLER)
  row = Row.of(np.concatenate([
      filler[:before], [KEY], digits, [KEY], digits, filler[: room - before], [ASK], digits[:-1],
  ]))
  row.targets[length - size :] = digits
  return row
