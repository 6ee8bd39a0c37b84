"""Figures of representations on cases whose answers are known."""

import math

import numpy as np
import pytest

from dense_jax.analysis.representations import (
    Features,
    cosine_similarity,
    effective_rank,
    gaussian_information,
    linear_cka,
    probe_recovery,
)

S = 400


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def rotation(size, seed=1):
  return np.linalg.qr(random(size, size, seed=seed))[0]


def test_identical_layers():
  x = random(S, 30) * np.arange(1, 31)
  assert cosine_similarity(Features(x), Features(x)) == pytest.approx(1)
  assert linear_cka(Features(x), Features(x)) == pytest.approx(1)
  assert probe_recovery(Features(x), Features(x)) > 0.99
  assert gaussian_information(Features(x), Features(x)) > 50


def test_cka_knows_no_rotation_scale_or_shift_and_cosines_do():
  x = random(S, 30) * np.arange(1, 31)
  y = 7 * x @ rotation(30) + 3
  assert linear_cka(Features(x), Features(y)) == pytest.approx(1)
  assert probe_recovery(Features(x), Features(y)) > 0.99
  assert abs(cosine_similarity(Features(x), Features(y - 3))) < 0.5
  assert cosine_similarity(Features(x), Features(-2 * x)) == pytest.approx(-1)


@pytest.mark.parametrize("features", [5, 50, 2000])  # Fewer and more than there are samples.
def test_independent_layers(features):
  figures = []
  for seed in range(8):
    x, y = random(S, features, seed=2 * seed), random(S, features, seed=2 * seed + 1)
    x, y = Features(x), Features(y)
    figures.append([linear_cka(x, y), cosine_similarity(x, y)])
    assert probe_recovery(x, y) < 0.05
  assert np.abs(np.mean(figures, axis=0)).max() < 0.01
  assert np.abs(figures).max() < 0.05


def test_cka_by_the_features():
  """For as many samples as decide it, CKA is |x^T y|^2 / (|x^T x| |y^T y|) of centred features."""
  common = random(20_000, 4)
  x, y = common[:, :3], common[:, 1:]
  assert linear_cka(Features(x[:3000]), Features(y[:3000])) == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_a_state_of_rank_r_has_rank_r(rank):
  columns = np.linalg.qr(random(S, rank) - random(S, rank).mean(axis=0))[0]
  columns -= columns.mean(axis=0)
  columns = np.linalg.qr(columns)[0]
  found = effective_rank(Features(columns @ rotation(40)[:rank] + 5))
  assert found == pytest.approx(rank, rel=1e-6)


def test_effective_ranks_by_hand():
  u = np.linalg.qr(random(S, 2) - random(S, 2).mean(axis=0))[0]
  u = np.linalg.qr(u - u.mean(axis=0))[0]
  shares = np.array([0.75, 0.25])
  wanted = math.exp(-np.sum(shares * np.log(shares)))
  assert effective_rank(Features(u * [3.0, 1.0])) == pytest.approx(wanted)
  assert effective_rank(Features(np.ones((S, 4)))) == 0


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_two_gaussians_with_known_information(correlation):
  """I = -1/2 log(1 - rho^2) for each pair of components; the mean over draws has no bias left."""
  pairs, samples = 4, 500
  found = []
  for seed in range(40):
    x = random(samples, pairs, seed=2 * seed)
    noise = random(samples, pairs, seed=2 * seed + 1)
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    x, y = Features(x @ rotation(pairs)), Features(y @ rotation(pairs, 2))
    found.append(gaussian_information(x, y))
  wanted = -0.5 * pairs * math.log(1 - correlation**2)
  error = np.std(found) / math.sqrt(len(found))
  assert np.mean(found) == pytest.approx(wanted, abs=3 * error + 1e-3)


def test_information_needs_samples():
  with pytest.raises(ValueError, match="20 samples are too few for 8 components"):
    gaussian_information(Features(random(20, 10)), Features(random(20, 10)))


def test_a_probe_recovers_what_is_there():
  x = random(S, 20)
  half = np.concatenate([x[:, :5], random(S, 5, seed=3)], axis=1)  # Half of it is not in x.
  assert probe_recovery(Features(x), Features(half)) == pytest.approx(0.5, abs=0.08)
  assert probe_recovery(Features(x), Features(x[:, :5] ** 2 - 1)) < 0.05  # Nothing linear.
