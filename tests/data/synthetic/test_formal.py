"""Rows of formal languages agree with their published definitions."""

import numpy as np
import pytest

from dense_jax.config import TaskConfig
from dense_jax.data.synthetic import formal
from dense_jax.data.synthetic.row import NO_TARGET, Random
from dense_jax.data.synthetic.tasks import names, resolve

WORDS = names(resolve(TaskConfig("listops")))


def _text(row):
  return " ".join(WORDS[id] for id in row.tokens)


def _value(text):
  """Computes an expression's value by rewriting innermost lists, independently of the tree."""
  words, stack = text.split(), []
  for word in words:
    if word != "]":
      stack.append(word)
      continue
    values = []
    while not stack[-1].startswith("["):
      values.append(int(stack.pop()))
    operator = stack.pop()
    stack.append(str({
        "[MIN": np.min, "[MAX": np.max, "[MED": lambda v: int(np.median(v)),
        "[SM": lambda v: np.sum(v) % 10,
    }[operator](values)))
  (value,) = stack
  return int(value)


def _shape(text):
  """Returns the numbers of arguments of all operators, and the depth of the tree."""
  counts, open_lists, depth = [], [], 1
  for word in text.split():
    if word == "]":
      counts.append(open_lists.pop())
      continue
    if open_lists:
      open_lists[-1] += 1
    if word.startswith("["):
      open_lists.append(0)
    else:
      depth = max(depth, 1 + len(open_lists))
  return counts, depth


def test_the_independent_evaluator_by_hand():
  assert _value("[MAX 4 [MIN 2 3 ] 0 [MED 1 5 8 9 2 ] ]") == 5
  assert _value("[MED 1 4 ]") == 2  # The median of two is their mean, cut off.
  assert _value("[SM 9 9 [MED 0 9 9 9 ] ]") == 7


@pytest.mark.parametrize(("length", "arguments", "depth"), [(2000, 10, 10), (60, 4, 3), (8, 2, 2)])
def test_listops_is_the_published_generator(length, arguments, depth):
  counts, operators, digits, depths, answers = [], 0, 0, [], []
  for seed in range(60 if length > 100 else 300):
    row = formal.listops(Random(seed), length, arguments, depth)
    assert WORDS[row.tokens[-1]] == "="
    text = _text(row).removesuffix(" =")
    # Parentheses are no tokens there, and its lengths count none.
    assert length // 4 < len(text.split()) < length
    assert np.flatnonzero(row.targets != NO_TARGET).tolist() == [len(row.tokens) - 1]
    assert WORDS[row.targets[-1]] == str(_value(text))
    of_row, deepest = _shape(text)
    counts += of_row
    depths.append(deepest)
    operators += len(of_row)
    digits += sum(word.isdigit() for word in text.split())
    answers.append(row.targets[-1])
  assert min(counts) == 2 and max(counts) == arguments and max(depths) == depth
  assert len(set(answers)) > 5
  if length > 100:
    # As many arguments as drawn evenly from 2 to 10, and lengths prefer neither end much.
    shares = np.bincount(counts, minlength=11)[2:] / len(counts)
    np.testing.assert_allclose(shares, 1 / 9, atol=0.03)


def test_listops_draws_operators_and_digits_evenly():
  ids = np.concatenate([formal.listops(Random(s), 500, 10, 10).tokens for s in range(40)])
  for first, count in ((formal.FIRST_DIGIT, 10), (formal.FIRST_OPERATOR, 4)):
    found = np.bincount(ids, minlength=17)[first : first + count]
    np.testing.assert_allclose(found / found.sum(), 1 / count, atol=0.03)


def test_parity_of_all_bits_so_far():
  for seed in range(20):
    row = formal.parity(Random(seed), 30)
    bits = row.tokens - 1
    assert set(bits) == {0, 1}
    assert [target - 1 for target in row.targets] == [
        sum(bits[: place + 1]) % 2 for place in range(30)
    ]


@pytest.mark.parametrize(("kinds", "depth"), [(1, 1), (2, 3), (8, 5)])
def test_dyck_asks_for_the_kind_that_closes(kinds, depth):
  deepest, opened, free = 0, 0, 0
  for seed in range(40):
    row = formal.dyck(Random(seed), 50, kinds, depth)
    stack = []
    for token, target in zip(row.tokens, row.targets, strict=True):
      if len(stack) not in (0, depth):
        free += 1
        opened += token <= kinds
      if token <= kinds:
        stack.append(token)
      else:
        assert token - kinds == stack.pop()  # Balanced, kind by kind.
      deepest = max(deepest, len(stack))
      if target != NO_TARGET:
        assert target - kinds == stack[-1]
    follows = row.tokens[1:]
    np.testing.assert_array_equal(row.targets[:-1] != NO_TARGET, follows > kinds)
    np.testing.assert_array_equal(row.targets[:-1][follows > kinds], follows[follows > kinds])
  assert deepest == depth
  assert depth == 1 or abs(opened / free - 0.5) < 0.1
