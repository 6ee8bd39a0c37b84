"""The order of rows: golden values, permutations, epochs, mixtures."""

import hashlib
import itertools
import math

import numpy as np
import pytest

from dense_jax.config.mixture import parse_mixtures
from dense_jax.data import order
from dense_jax.data.order import Order, Phase, permuted
from dense_jax.errors import InputError

ONE = [Phase(0, {"": 1})]
MASK = 2**64 - 1


def _by_hand(place: int, size: int, seed: int, name: str, epoch: int) -> int:
  """Computes one value of a permutation in Python's integers, by the module's description."""

  def mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)

  golden = 0x9E3779B97F4A7C15
  content = hashlib.sha256(f"dense_jax order {seed} {name}".encode()).digest()
  key = mix((int.from_bytes(content[:8], "little") + golden * (epoch + 1)) & MASK)
  a = math.isqrt(size - 1) + 1
  b = math.ceil(size / a)
  value = place
  while True:
    right, left = divmod(value, a)
    for number in range(8):
      salt = mix((key + golden * (number + 1)) & MASK)
      if number % 2:
        right = (right + mix((salt + left) & MASK)) % b
      else:
        left = (left + mix((salt + right) & MASK)) % a
    value = left + a * right
    if value < size:
      return value


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 10**9 + 7])
def test_values_are_those_of_the_description(size):
  found = Order({"a": size}, 7, [Phase(0, {"a": 1})])
  for first in (0, size - 1, 3 * size + size // 2, 2**40):
    _, row_N = found.rows(first, 3)
    by_hand = [
        _by_hand(place % size, size, 7, "a", place // size) for place in range(first, first + 3)
    ]
    assert row_N.tolist() == by_hand


def test_golden_orders():
  """Whatever changes these values changes what every run computes: `VERSION` grows with them."""
  _, small_N = Order({"": 10}, 0, ONE).rows(0, 20)
  assert small_N.tolist() == [6, 9, 4, 1, 2, 0, 7, 8, 5, 3, 3, 6, 0, 9, 8, 5, 1, 4, 2, 7]
  _, large_N = Order({"": 10**9}, 1, ONE).rows(0, 6)
  assert large_N.tolist() == [
      326849979, 600563258, 123512683, 369628410, 269700445, 640968097]
  phases = [Phase(0, {"web": 3, "books": 2, "code": 1}), Phase(8, {"web": 1, "code": 1})]
  part_N, row_N = Order({"web": 7, "books": 5, "code": 4}, 2, phases).rows(0, 12)
  assert part_N.tolist() == [0, 1, 0, 2, 1, 0, 0, 1, 0, 2, 0, 2]
  assert row_N.tolist() == [4, 1, 5, 3, 4, 6, 0, 0, 2, 2, 3, 1]
  assert Order({"": 10}, 0, ONE).digest == "a7f2473c4171dad9a36bda21c3d8a87d"
  assert order.VERSION == 1


@pytest.mark.parametrize("size", [*range(1, 20), 100, 1023, 4096, 65537])
def test_every_epoch_is_a_permutation(size):
  _, row_N = Order({"": size}, 3, ONE).rows(0, 4 * size)
  for epoch in row_N.reshape(4, size):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_small_permutations_are_all_as_likely():
  """Chi square of the 24 permutations of 4 rows in 24,000 epochs: 23 degrees of freedom."""
  _, row_N = Order({"": 4}, 0, ONE).rows(0, 4 * 24_000)
  counts = np.unique(row_N.reshape(-1, 4), axis=0, return_counts=True)[1]
  assert len(counts) == 24
  assert np.sum((counts - 1000) ** 2 / 1000) < 60


def test_a_large_order_is_uniform_and_has_no_memory():
  size = 10**9
  _, row_N = Order({"": size}, 0, ONE).rows(123_456, 200_000)
  counts = np.bincount(row_N * 100 // size, minlength=100)
  assert np.sum((counts - 2000) ** 2 / 2000) < 180
  assert len(np.unique(row_N)) == len(row_N)
  steps = np.corrcoef(row_N[1:], row_N[:-1])[0, 1]
  assert abs(steps) < 0.01


def test_neighbouring_seeds_epochs_and_parts_share_no_order():
  size = 1000
  found = [
      Order({name: size}, seed, [Phase(0, {name: 1})]).rows(epoch * size, size)[1]
      for name in ("a", "b") for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 2)
  ]
  for one, other in itertools.combinations(found, 2):
    assert np.count_nonzero(one == other) < 15  # One row, as of two random permutations.


def test_rows_do_not_depend_on_how_many_are_asked_for_at_once():
  phases = [Phase(0, {"a": 2, "b": 1}), Phase(50, {"a": 1, "b": 5})]
  found = Order({"a": 11, "b": 3}, 1, phases)
  whole = np.stack(found.rows(0, 200))
  for first, count in ((0, 1), (37, 40), (49, 2), (50, 150), (199, 1)):
    np.testing.assert_array_equal(np.stack(found.rows(first, count)), whole[:, first:first + count])


@pytest.mark.parametrize("size", [1, 5, 2**62])
def test_the_largest_sizes_and_keys(size):
  place_N = np.array([0, size // 2, size - 1])
  row_N = permuted(place_N, size, np.full(3, MASK, np.uint64))
  assert ((row_N >= 0) & (row_N < size)).all() and len({*row_N.tolist()}) == len({*place_N})


@pytest.mark.parametrize("shares", [[1], [1, 1], [7, 3], [999, 1], [5, 3, 2], [97, 1, 1, 1],
                                    [1, 2, 4, 8, 16], [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]])
def test_a_mixture_is_exact_to_within_one_row(shares):
  """Of any window of two parts to within one; of more, of any beginning, and twice that of any."""
  names = [f"part{number}" for number in range(len(shares))]
  total = sum(shares)
  phases = [Phase(0, dict(zip(names, shares, strict=True)))]
  part_N, _ = Order(dict.fromkeys(names, 10), 0, phases).rows(0, 3 * total)
  for part, share in enumerate(shares):
    had_N = np.concatenate([[0], np.cumsum(part_N == part)])
    off_N = had_N - share / total * np.arange(3 * total + 1)
    bound = 1 - 1 / (2 * len(shares) - 2) if len(shares) > 1 else 0
    assert np.abs(off_N).max() <= bound + 1e-9
    assert np.ptp(off_N) <= (1 if len(shares) < 3 else 2 * bound) + 1e-9


def test_each_part_has_its_epochs_whatever_the_mixtures():
  sizes = {"a": 13, "b": 5}
  phases = [Phase(0, {"a": 1}), Phase(10, {"a": 3, "b": 2}), Phase(27, {"b": 1})]
  part_N, row_N = Order(sizes, 4, phases).rows(0, 60)
  assert (part_N[:10] == 0).all() and (part_N[27:] == 1).all()
  for part, size in enumerate(sizes.values()):
    rows = row_N[part_N == part]
    for epoch in range(len(rows) // size):
      np.testing.assert_array_equal(np.sort(rows[epoch * size:][:size]), np.arange(size))


def test_the_digest_tells_orders_apart():
  def found(seed=0, size=10, name=""):
    return Order({name: size}, seed, [Phase(0, {name: 1})]).digest

  assert found() == found()
  assert len({found(), found(seed=1), found(size=11), found(name="a")}) == 4


@pytest.mark.parametrize("text, expected", [
    ("", []),
    ("web=0.7,books=0.3", ["0: books=3,web=7"]),
    (" web = 50 , books = 50 ; 20: web=1 ", ["0: books=1,web=1", "20: web=1"]),
    ("a=1,b=0", ["0: a=1"]),
])
def test_mixtures_are_parsed(text, expected):
  assert [str(mixture) for mixture in parse_mixtures(text)] == expected


@pytest.mark.parametrize("text, why", [
    ("web", "'web' is no part with its share"),
    ("web=1,web=2", "'web=2' is no part"),
    ("web=-1", "no part with its share"),
    ("web=nan", "no part with its share"),
    ("a/b=1", "no part with its share"),
    ("web=0", "all shares are 0"),
    ("5: web=1", "steps begin with 0 and increase"),
    ("web=1; 7: web=1; 7: web=2", "steps begin with 0 and increase"),
    ("web=1; x: web=1", "names no step"),
    ("web=1;", "no part with its share"),
    ("web=0.333333,books=0.666667", "come out even only after 1,000,000 rows"),
])
def test_mixtures_that_are_not_valid(text, why):
  with pytest.raises(InputError, match=r"^config\.data\.mixture = .* is not valid") as error:
    parse_mixtures(text)
  assert why in str(error.value)
