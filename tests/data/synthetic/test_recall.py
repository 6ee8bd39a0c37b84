"""Rows of recall tasks agree with their published definitions."""

import numpy as np
import pytest

from dense_jax.data.synthetic import recall
from dense_jax.data.synthetic.row import BLANK, NO_TARGET, Random


def _places(row):
  return np.flatnonzero(row.targets != NO_TARGET)


@pytest.mark.parametrize(("length", "vocab", "pairs"), [(16, 12, 2), (64, 256, 8), (33, 18, 8)])
@pytest.mark.parametrize("others", [False, True])
def test_mqar_asks_for_each_key_once(length, vocab, pairs, others):
  for seed in range(20):
    row = recall.mqar(Random(seed), length, vocab, pairs, random_non_queries=others)
    keys, values = row.tokens[: 2 * pairs : 2], row.tokens[1 : 2 * pairs : 2]
    places = _places(row)
    assert len(row.tokens) == len(row.targets) == length
    assert sorted(set(keys)) == sorted(keys) and keys.min() >= 1 and keys.max() < vocab // 2
    assert len(set(values)) == pairs and values.min() >= vocab // 2 and values.max() < vocab
    assert len(places) == pairs and places.min() >= 2 * pairs and not (places % 2).any()
    value_of = dict(zip(keys.tolist(), values.tolist(), strict=True))
    asked = row.tokens[places].tolist()
    assert sorted(asked) == sorted(keys)
    assert row.targets[places].tolist() == [value_of[key] for key in asked]
    rest = np.delete(row.tokens, np.r_[: 2 * pairs, places])
    assert (rest != BLANK).any() == others
    assert rest.max(initial=0) < vocab


def test_mqar_asks_by_a_power_law():
  """The first slot has the weight 1, the second 2^-0.99; exponents of 0 draw all alike."""
  def share(power_a):
    rows = [recall.mqar(Random(seed), 64, 64, 1, power_a=power_a) for seed in range(4000)]
    slots = np.asarray([(_places(row)[0] - 2) // 2 for row in rows])
    return np.bincount(slots, minlength=31) / len(rows)

  weights = np.arange(1, 32) ** -0.99
  np.testing.assert_allclose(share(0.01), weights / weights.sum(), atol=0.025)
  np.testing.assert_allclose(share(1.0), np.full(31, 1 / 31), atol=0.015)


@pytest.mark.parametrize(("length", "vocab", "size"), [(20, 16, 4), (8, 3, 4), (7, 16, 3)])
def test_copying_repeats_what_is_no_noise(length, vocab, size):
  places = np.zeros(length - size)
  for seed in range(400):
    row = recall.copying(Random(seed), length, vocab, size)
    shown = row.tokens[: length - size]
    copied = shown[shown != BLANK]
    assert len(copied) == size and copied.max() <= vocab - 2
    assert (row.tokens[-size:] == vocab - 1).all()
    assert _places(row).tolist() == list(range(length - size, length))
    np.testing.assert_array_equal(row.targets[-size:], copied)
    places += shown != BLANK
  np.testing.assert_allclose(places / 400, size / (length - size), atol=0.1)


@pytest.mark.parametrize(("length", "vocab", "size"), [(20, 16, 1), (4, 4, 1), (9, 5, 3)])
def test_induction_repeats_what_followed_the_trigger(length, vocab, size):
  firsts = set()
  for seed in range(300):
    row = recall.induction(Random(seed), length, vocab, size)
    first, again = np.flatnonzero(row.tokens == recall.TRIGGER)
    assert len(row.tokens) == length and again == length - size
    assert row.tokens.min() >= recall.TRIGGER and row.tokens.max() < vocab
    copied = row.tokens[first + 1 : first + 1 + size]
    np.testing.assert_array_equal(row.targets[again:], copied)
    np.testing.assert_array_equal(row.tokens[again + 1 :], copied[:-1])
    assert _places(row).tolist() == list(range(again, length))
    firsts.add(int(first))
  # As published, the last place from which all copied tokens precede the trigger is left out.
  assert firsts == set(range(length - size - (1 + size)))


@pytest.mark.parametrize(("length", "size"), [(40, 5), (17, 5), (9, 2)])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0, -1.0])
def test_the_passkey_stands_at_its_depth(length, size, depth):
  places = set()
  for seed in range(60):
    row = recall.passkey(Random(seed), length, 20, size, depth)
    assert len(row.tokens) == length
    key, again = np.flatnonzero(row.tokens == recall.KEY)
    (ask,) = np.flatnonzero(row.tokens == recall.ASK)
    digits = row.tokens[key + 1 : again]
    assert len(digits) == size and digits.min() >= 1 and digits.max() <= 10
    np.testing.assert_array_equal(row.tokens[again + 1 : again + 1 + size], digits)
    assert ask == length - size
    np.testing.assert_array_equal(row.targets[ask:], digits)
    np.testing.assert_array_equal(row.tokens[ask + 1 :], digits[:-1])
    assert _places(row).tolist() == list(range(ask, length))
    filler = np.delete(row.tokens, np.r_[key : again + 1 + size, ask:length])
    assert (filler >= recall.FILLER).all()
    np.testing.assert_array_equal(row.tokens[:key], recall.FILLER + np.arange(key) % 7)
    places.add(int(key))
  room = length - (3 * size + 2)
  assert places == ({round(depth * room)} if depth >= 0 else places)
  assert depth >= 0 or {0, room} <= places or room > 10
