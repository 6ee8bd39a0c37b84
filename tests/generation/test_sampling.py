"""Sampling: which tokens can be drawn, how often, and the same for the same seed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.errors import InputError
from dense_jax.generation.sampling import Sampling, sample
from tests.builders import normal

V = 11
INF = float("inf")
LOGITS = normal(0, 3, V, scale=1.5)


@functools.partial(jax.jit, static_argnames=("sampling", "draws"))
def _draw(logits_BV, sampling, seed=0, draws=2000):
  keys = jax.random.split(jax.random.key(seed), draws)
  return jax.vmap(lambda key: sample(logits_BV, key, sampling))(keys)


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
  tokens = sample(LOGITS, jax.random.key(0), Sampling(temperature=0))
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
  logits = jnp.asarray([row + [-INF] * (10 - len(row)) for row, _ in rows], jnp.float32)
  assert _support(_draw(logits, sampling, draws=500)) == [tokens for _, tokens in rows]


@pytest.mark.parametrize(("top_p", "counts"), [
    (0.1, (10, 50, 1000)), (1 / 3, (3, 9, 600)), (0.7, (10, 90, 1000)), (6 / 7, (7, 14, 70)),
])
def test_equal_shares_reach_p_exactly(top_p, counts):
  logits = jnp.where(jnp.arange(1000)[None] < jnp.asarray(counts)[:, None], 0.0, -INF)
  tokens = _draw(logits, Sampling(top_p=top_p), draws=5000)
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
    ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
])
def test_a_value_out_of_range_is_an_error_that_names_it(values, field):
  with pytest.raises(InputError, match=field):
    Sampling(**values)
