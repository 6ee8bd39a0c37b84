"""Sampling: which tokens can be drawn, how often, and the same for the same seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.errors import InputError
from dense_jax.generation import sampling as module
from dense_jax.generation.sampling import Sampling, Settings, penalized, sample
from tests.builders import fast_jit, normal

V = 11
INF = float("inf")
LOGITS = normal(0, 3, V, scale=1.5)


_sample = fast_jit(sample)


def _draw(logits_BV, sampling, seed=0, draws=2000):
  """Draws from each row, or from row i by the i-th sampling; each draw is a row of one batch."""
  logits_BV = jnp.asarray(logits_BV, jnp.float32)
  rows = len(logits_BV)
  samplings = [sampling] * rows if isinstance(sampling, Sampling) else sampling
  keys = jax.random.split(jax.random.key(seed), draws * rows)
  tokens = _sample(jnp.tile(logits_BV, (draws, 1)), keys, Settings.of(samplings * draws))
  return np.asarray(tokens).reshape(draws, rows)


def _support(tokens_SB):
  """Returns the set of tokens that each row drew."""
  return [set(np.unique(column).tolist()) for column in np.asarray(tokens_SB).T]


def _top_p(logits, top_p):
  """Returns the smallest set of likeliest tokens whose probability reaches p, by numpy."""
  probability = np.exp(logits - logits.max())
  probability /= probability.sum()
  chosen, total = set(), 0.0
  for token in np.argsort(-probability):
    if total >= top_p:
      break
    chosen.add(int(token))
    total += probability[token]
  return chosen


def test_greedy_is_the_argmax():
  tokens = sample(LOGITS, jax.random.split(jax.random.key(0), 3),
                  Settings.of([Sampling(temperature=0)] * 3))
  assert tokens.dtype == jnp.int32
  np.testing.assert_array_equal(tokens, np.argmax(LOGITS, axis=-1))


@pytest.mark.parametrize("sampling", [
    Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-3),
    Sampling(temperature=0, top_k=3, top_p=0.5),
])
def test_all_of_these_are_greedy_too(sampling):
  tokens = _draw(LOGITS, sampling, draws=50)
  np.testing.assert_array_equal(tokens, np.broadcast_to(np.argmax(LOGITS, axis=-1), (50, 3)))


@pytest.mark.parametrize("top_k", [2, 5])
def test_top_k_draws_the_k_likeliest_and_no_other(top_k):
  expected = [set(np.argsort(-row)[:top_k].tolist()) for row in np.asarray(LOGITS)]
  flat = LOGITS / 3  # So that the rarest of them is drawn too.
  assert _support(_draw(flat, Sampling(top_k=top_k))) == expected


@pytest.mark.parametrize("top_k", [0, V, V + 5])
def test_k_of_nothing_or_all_draws_everything(top_k):
  assert _support(_draw(LOGITS / 5, Sampling(top_k=top_k))) == [set(range(V))] * 3


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_top_p_draws_the_smallest_set_that_reaches_p(top_p):
  flat = LOGITS / 2
  expected = [_top_p(row, top_p) for row in np.asarray(flat)]
  assert len({len(support) for support in expected} | {1}) > 1
  assert _support(_draw(flat, Sampling(top_p=top_p))) == expected


def test_top_p_follows_temperature_and_top_k():
  sampling = Sampling(temperature=2.0, top_k=6, top_p=0.8)
  expected = []
  for row in np.asarray(LOGITS) / 2.0:
    kept = np.where(row >= np.sort(row)[-6], row, -np.inf)
    expected.append(_top_p(kept, 0.8))
  assert _support(_draw(LOGITS, sampling)) == expected


def test_min_p_keeps_a_fraction_of_the_likeliest_at_that_temperature():
  logits = np.log([[8.0, 4.0, 2.0, 1.0]])
  assert _support(_draw(logits, Sampling(min_p=0.5))) == [{0, 1}]
  assert _support(_draw(logits, Sampling(min_p=0.24))) == [{0, 1, 2}]
  # Square roots: 2.83, 2, 1.41, 1.
  assert _support(_draw(logits, Sampling(min_p=0.4, temperature=2.0))) == [{0, 1, 2}]
  assert _support(_draw(logits, Sampling(min_p=1.0))) == [{0}]
  # The smaller of the sets of top-p and min-p.
  assert _support(_draw(logits, Sampling(min_p=0.24, top_p=0.6))) == [{0, 1}]
  assert _support(_draw(logits, Sampling(min_p=0.5, top_p=0.9))) == [{0, 1}]


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
  logits = jnp.asarray([[2.0, -1.0, 2.0, 0.0], [2.0, -1.0, 2.0, 0.0]])
  seen = jnp.asarray([[True, True, False, True], [True, True, True, True]])
  settings = Settings.of([Sampling(repetition_penalty=4.0), Sampling()])
  np.testing.assert_array_equal(
      penalized(logits, seen, settings), [[0.5, -4.0, 2.0, 0.0], [2.0, -1.0, 2.0, 0.0]]
  )


MIXED = [
    Sampling(temperature=0), Sampling(), Sampling(top_k=3), Sampling(top_p=0.7),
    Sampling(min_p=0.3), Sampling(temperature=3.0, top_k=5, top_p=0.9, min_p=0.05),
]


def test_a_row_draws_the_same_whatever_the_others_are():
  """Greedy rows alone, or rows without limits, take shorter ways through the program."""
  logits = normal(1, len(MIXED), 300)
  keys = jax.random.split(jax.random.key(2), len(MIXED))
  together = np.asarray(_sample(logits, keys, Settings.of(MIXED)))
  for row, sampling in enumerate(MIXED):
    same = _sample(
        jnp.tile(logits[row], (len(MIXED), 1)), keys[jnp.full(len(MIXED), row)],
        Settings.of([sampling] * len(MIXED)),
    )
    assert np.asarray(same).tolist() == [together[row]] * len(MIXED)


def test_few_likeliest_tokens_and_all_of_them_give_the_same_set(monkeypatch):
  """Rows that keep more tokens than are looked at first, and equal logits among them."""
  samplings = [
      Sampling(top_k=5), Sampling(top_k=40), Sampling(top_p=0.1), Sampling(top_p=0.9),
      Sampling(min_p=0.02), Sampling(min_p=0.5), Sampling(top_k=40, top_p=0.95), Sampling(),
  ]
  logits = jnp.round(4 * normal(3, 5 * len(samplings), 100)) / 4
  kept = []
  for few in (4, 20, 100):
    monkeypatch.setattr(module, "_FEW", few)
    kept.append(fast_jit(lambda *args: module._kept(*args))(logits, Settings.of(samplings * 5)))
  np.testing.assert_array_equal(kept[0], kept[2])
  np.testing.assert_array_equal(kept[1], kept[2])
  sizes = np.asarray(kept[2]).sum(axis=1).reshape(5, -1)
  assert set(sizes[:, 0]) == {5} and set(sizes[:, 1]) == {40} and set(sizes[:, 7]) == {100}


# Options -> rows of logits and which tokens they can draw. Each row is filled up with -INF.
TIES = {
    Sampling(top_k=1): [([2, 3, 2, 0, 2], {1}), ([-0.0, 0.0], {0})],
    Sampling(top_k=2): [
        ([3, 2, 2, 2, 0], {0, 1}), ([1] * 10, {0, 1}), ([-INF, 2, -INF, 2, 2], {1, 3}),
    ],
    Sampling(top_k=3): [
        ([3, 2, 2, 2, 0], {0, 1, 2}), ([0, 2, 2, 3, 2], {1, 2, 3}),
        ([-0.0, 0.0, -0.0, 0.0, -1], {0, 1, 2}), ([1, -INF, -INF, 1], {0, 3}),
    ],
    Sampling(top_k=10): [([1] * 10, set(range(10))), ([3, 2, 2, 2, 0], {0, 1, 2, 3, 4})],
    Sampling(top_k=12): [([1] * 10, set(range(10))), ([3, 2, 2, 2, 0], {0, 1, 2, 3, 4})],
    Sampling(top_p=0.25): [([1] * 4, {0}), ([3, 2, 2, 2, 0], {0})],
    # Probabilities of 3, 2, 2, 2, 0: 0.46, three times 0.17, 0.02.
    Sampling(top_p=0.5): [
        ([1] * 4, {0, 1}), ([3, 2, 2, 2, 0], {0, 1}), ([-0.0, 0.0, -0.0, 0.0], {0, 1}),
    ],
    Sampling(top_p=0.7): [
        ([1] * 10, set(range(7))), ([3, 2, 2, 2, 0], {0, 1, 2}), ([2, 0, 2, 3, 2], {0, 2, 3}),
        ([-INF, 1, -INF, 1], {1, 3}),
    ],
    Sampling(top_p=1e-60): [([1] * 3, {0}), ([0, 1, 1], {1})],
    Sampling(top_k=4, top_p=0.5): [([1] * 5, {0, 1}), ([3, 2, 2, 2, 2], {0, 1})],
    # Of 3, 2, 2: 0.58 and twice 0.21. Of all it would be two tokens more.
    Sampling(top_k=3, top_p=0.75): [([3, 2, 2, 2, 0], {0, 1}), ([1] * 5, {0, 1, 2})],
    # A temperature that makes float32 numbers equal does not make tokens equally likely.
    Sampling(top_k=2, temperature=1e38): [([1, 2, 3, 4], {2, 3})],
    Sampling(top_p=0.5, temperature=1e38): [([4, 1, 3, 2], {0, 2})],
    Sampling(temperature=1e300): [([1, 2, 3, -INF], {0, 1, 2})],
    Sampling(top_p=0.9, temperature=1e-30): [([2, 2, 1], {0, 1})],
}


@pytest.mark.parametrize(("sampling", "rows"), TIES.items(), ids=map(str, TIES))
def test_of_equally_likely_tokens_the_lowest_come_first(sampling, rows):
  rows = (rows * 4)[:4]  # One shape for all.
  logits = jnp.asarray([row + [-INF] * (10 - len(row)) for row, _ in rows], jnp.float32)
  assert _support(_draw(logits, sampling, draws=500)) == [tokens for _, tokens in rows]


@pytest.mark.parametrize(("top_p", "counts"), [
    (0.1, (10, 50, 1000)), (1 / 3, (3, 9, 600)), (0.7, (10, 90, 1000)), (6 / 7, (7, 14, 70)),
])
def test_equal_shares_reach_p_exactly(top_p, counts):
  logits = jnp.where(jnp.arange(1000)[None] < jnp.asarray(counts)[:, None], 0.0, -INF)
  tokens = _draw(logits, Sampling(top_p=top_p), draws=2000)
  for count, drawn in zip(counts, _support(tokens), strict=True):
    kept = round(top_p * count)
    assert drawn <= set(range(kept))
    assert kept > 100 or drawn == set(range(kept))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_that_temperature(temperature):
  draws = 20000
  tokens = np.asarray(_draw(LOGITS, Sampling(temperature=temperature), draws=draws))
  expected = np.asarray(jax.nn.softmax(LOGITS / temperature, axis=-1))
  for row in range(3):
    observed = np.bincount(tokens[:, row], minlength=V) / draws
    # Five standard deviations of a frequency.
    assert np.all(np.abs(observed - expected[row]) < 5 * np.sqrt(expected[row] / draws) + 1e-9)


def test_a_seed_reproduces_and_another_differs():
  first, again, other = (
      np.asarray(_draw(LOGITS, Sampling(), seed=seed, draws=50)) for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


@pytest.mark.parametrize(("values", "field"), [
    ({"temperature": -1.0}, "temperature"), ({"temperature": float("inf")}, "temperature"),
    ({"temperature": float("nan")}, "temperature"), ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"), ({"min_p": float("nan")}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty"),
])
def test_a_value_out_of_range_is_an_error_that_names_it(values, field):
  with pytest.raises(InputError, match=field):
    Sampling(**values)
