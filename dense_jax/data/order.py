"""The order of training rows, as a function of the seed and a row's place.

Place g of a run (row r of batch k, of B rows, is place k B + r) is given to one part of the data by
the mixture, and to one row of that part by a permutation. Both are computed on demand, in constant
memory, so that no iterator has a state that could be lost.

**Epochs.** The n-th place of a part of N rows is row pi(n mod N) of it, where pi is the permutation
of epoch n // N. Every row is therefore taken once an epoch, whatever the mixture does.

**The permutation** is a Feistel network on pairs (left < a, right < b) with a b >= N, whose rounds
add a hash of the one half to the other half, modulo a or b (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). A result >= N goes through the network again, until it is below N:
that walks along a cycle of the larger permutation, and so makes a permutation of the smaller set.

**The mixture** of parts with shares w is the schedule of Tijdeman ("The chairman assignment
problem", 1980). After any number g of places, a part of C has had w g places to within
1 - 1/(2C - 2), so less than one. Over any window of places it is so within twice that: one of two
parts, less than two of more. No schedule does better for all shares: within one over every window,
for three or more parts, is possible for few special shares alone (Fraenkel's conjecture).

Both definitions are this file's own, and have golden values in the tests. `VERSION` grows with any
change of them.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dense_jax.data.cache import digest

VERSION = 1
_ROUNDS = 8
# Of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# Epochs whose permutations the digest contains, and the number of places of each.
_PROBED_EPOCHS, _PROBES = (0, 1, 1000), 64


@dataclasses.dataclass(frozen=True)
class Phase:
  """A mixture, from a place on until the next phase begins.

  Attributes:
    begin: the first place.
    shares: part -> its share of the places, an integer >= 1; others have none.
  """

  begin: int
  shares: Mapping[str, int]


class Order:
  """Tells which row of which part stands at each place."""

  def __init__(self, sizes: Mapping[str, int], seed: int, phases: Sequence[Phase]) -> None:
    """Prepares the schedules of the phases, in memory of 6 bytes for each unit of their shares.

    Args:
      sizes: part -> its number of rows, >= 1.
      seed: >= 0.
      phases: by increasing `begin`, the first of which is 0; of parts in `sizes`.
    """
    self._names = tuple(sizes)
    self._sizes = np.asarray([*sizes.values()], np.int64)
    self._keys = [_part_key(seed, name) for name in self._names]
    self._begins = [phase.begin for phase in phases]
    self._schedules = [
        _Schedule([phase.shares.get(name, 0) for name in self._names]) for phase in phases
    ]
    # Places that each part had before each phase.
    self._had = [np.zeros(len(self._names), np.int64)]
    for number, schedule in enumerate(self._schedules[:-1]):
      length = self._begins[number + 1] - self._begins[number]
      self._had.append(self._had[-1] + schedule.counts(length))

  def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the parts and rows at the places [first, first + count).

    Returns:
      int64 [count], indices into the parts' names in the order of `sizes`, and int64 [count], the
      row of the part.
    """
    part_N = np.empty(count, np.int64)
    number_N = np.empty(count, np.int64)
    ends = [*self._begins[1:], first + count]
    for begin, end, had, schedule in zip(
        self._begins, ends, self._had, self._schedules, strict=True
    ):
      low, high = max(first, begin), min(first + count, end)
      if low < high:
        here = slice(low - first, high - first)
        part_N[here], taken_N = schedule.at(np.arange(low - begin, high - begin))
        number_N[here] = had[part_N[here]] + taken_N
    row_N = np.empty(count, np.int64)
    for part, key in enumerate(self._keys):
      here_N = part_N == part
      if here_N.any():
        epoch_N, place_N = np.divmod(number_N[here_N], self._sizes[part])
        row_N[here_N] = permuted(place_N, int(self._sizes[part]), _epoch_keys(key, epoch_N))
    return part_N, row_N

  @property
  def names(self) -> tuple[str, ...]:
    """The parts' names."""
    return self._names

  @property
  def digest(self) -> str:
    """Hex digest of the permutations, which differs wherever their definition or seed does."""
    probes: list[str | int | bytes] = []
    for name, size, key in zip(self._names, self._sizes.tolist(), self._keys, strict=True):
      for epoch in _PROBED_EPOCHS:
        place_N = np.arange(_PROBES, dtype=np.int64) * max(size // _PROBES, 1) % size
        row_N = permuted(place_N, size, _epoch_keys(key, np.full(_PROBES, epoch)))
        probes += [name, size, epoch, row_N.astype("<i8").tobytes()]
    return digest("order", VERSION, *probes)


def _part_key(seed: int, name: str) -> int:
  content = hashlib.sha256(f"dense_jax order {seed} {name}".encode()).digest()
  return int.from_bytes(content[:8], "little")


def _epoch_keys(key: int, epoch_N: np.ndarray) -> np.ndarray:
  return _mix(np.uint64(key) + _GOLDEN * (epoch_N.astype(np.uint64) + np.uint64(1)))


def _mix(value_N: np.ndarray) -> np.ndarray:
  """Hashes 64 bits to 64 bits, one to one: the output function of splitmix64."""
  value_N = (value_N ^ (value_N >> np.uint64(30))) * _FIRST
  value_N = (value_N ^ (value_N >> np.uint64(27))) * _SECOND
  return value_N ^ (value_N >> np.uint64(31))


def permuted(place_N: np.ndarray, size: int, key_N: np.ndarray) -> np.ndarray:
  """Returns the values of permutations of range(size) at places.

  Args:
    place_N: int64 [N], in [0, size).
    size: from 1 to 2**62.
    key_N: uint64 [N], of the permutation that is meant for each place.

  Returns:
    int64 [N], in [0, size).
  """
  left_size = math.isqrt(size - 1) + 1
  right_size = -(-size // left_size)
  value_N = _network(place_N.astype(np.uint64), left_size, right_size, key_N)
  while (again_N := value_N >= np.uint64(size)).any():
    value_N[again_N] = _network(value_N[again_N], left_size, right_size, key_N[again_N])
  return value_N.astype(np.int64)


def _network(
    value_N: np.ndarray, left_size: int, right_size: int, key_N: np.ndarray
) -> np.ndarray:
  a, b = np.uint64(left_size), np.uint64(right_size)
  right_N, left_N = np.divmod(value_N, a)
  for number in range(_ROUNDS):
    round_N = _mix(key_N + _GOLDEN * np.full(1, number + 1, np.uint64))
    if number % 2:
      right_N = (right_N + _mix(round_N + left_N) % b) % b
    else:
      left_N = (left_N + _mix(round_N + right_N) % a) % a
  return left_N + a * right_N


class _Schedule:
  """A phase's mixture, place by place; it repeats after as many places as there are shares."""

  def __init__(self, shares: Sequence[int]) -> None:
    common = math.gcd(*shares)
    self._shares = np.asarray(shares, np.int64) // common
    parts = [part for part, share in enumerate(shares) if share]
    turns = _tijdeman([shares[part] // common for part in parts])
    self._part_M = np.asarray(parts, np.uint16)[turns]
    # How many places before each one its part has had, in this round.
    self._before_M = np.empty(len(turns), np.int32)
    for part in parts:
      here_M = self._part_M == part
      self._before_M[here_M] = np.arange(np.count_nonzero(here_M))

  def at(self, place_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the part at each place, and how many places before it that part has had."""
    round_N, turn_N = np.divmod(place_N, len(self._part_M))
    part_N = self._part_M[turn_N].astype(np.int64)
    return part_N, round_N * self._shares[part_N] + self._before_M[turn_N]

  def counts(self, length: int) -> np.ndarray:
    """Returns how many of the first `length` places each part has: int64 [parts]."""
    rounds, rest = divmod(length, len(self._part_M))
    return rounds * self._shares + np.bincount(self._part_M[:rest], minlength=len(self._shares))


def _tijdeman(shares: Sequence[int]) -> np.ndarray:
  """Returns the part that each of sum(shares) turns goes to: int64.

  A part is eligible for a turn if it is behind its share by 1/(2C - 2) of a turn or more, and of
  those the one comes first that would otherwise be the first to fall too far behind.
  """
  total, count = sum(shares), len(shares)
  if count == 1:
    return np.zeros(total, np.int64)
  # All in units of 1 / (total * wide) turns, exact in integers.
  wide = 2 * count - 2
  share_C = np.asarray(shares, np.int64)
  behind_C = np.zeros(count, np.int64)
  turns = np.empty(total, np.int64)
  for turn in range(total):
    behind_C += wide * share_C
    slack_C = (total * (wide - 1) - behind_C) / share_C
    slack_C[behind_C < total] = np.inf
    turns[turn] = np.argmin(slack_C)
    behind_C[turns[turn]] -= total * wide
  return turns
