"""Tests of HiPPO matrices against their definitions."""

import numpy as np
import pytest

from dense_jax.ops.lti import hippo
from tests.helpers import assert_trees_close

SIZES = [2, 4, 16, 64]


@pytest.mark.parametrize("n", SIZES)
def test_legs_is_its_definition(n):
  a, b = hippo.legs(n)
  for i in range(n):
    assert_trees_close(b[i], np.sqrt(2 * i + 1))
    for k in range(n):
      lower = -np.sqrt(2 * i + 1) * np.sqrt(2 * k + 1)
      assert_trees_close(a[i, k], np.float64(lower if i > k else -(i + 1) if i == k else 0))


@pytest.mark.parametrize("n", SIZES)
def test_normal_plus_low_rank_is_legs_in_its_eigenbasis(n):
  a, b = hippo.legs(n)
  eigenvalue, p, b_low, v = hippo.nplr_legs(n)
  assert eigenvalue.shape == p.shape == b_low.shape == (n // 2,)
  assert np.all(eigenvalue.imag > 0) and np.all(np.diff(eigenvalue.imag) > 0)
  w = np.concatenate([v, v.conj()], axis=1)
  eigenvalue, p, b_low = (np.concatenate([x, x.conj()]) for x in (eigenvalue, p, b_low))
  assert_trees_close(w.conj().T @ w, np.eye(n, dtype=complex))
  assert_trees_close(w @ (np.diag(eigenvalue) - np.outer(p, p.conj())) @ w.conj().T, a + 0j)
  assert_trees_close(w @ b_low, b + 0j)


@pytest.mark.parametrize("n", SIZES)
def test_real_blocks_have_legs_powers(n):
  """The real form in `dense_jax.ops.lti` has the same impulse response, whatever the basis."""
  a, b = hippo.legs(n)
  eigenvalue, p, b_low, v = hippo.nplr_legs(n)
  re, im = np.diag(eigenvalue.real), np.diag(eigenvalue.imag)
  p, b_low = (np.concatenate([x.real, x.imag]) for x in (p, b_low))
  blocks = np.block([[re, -im], [im, re]]) - 2 * np.outer(p, p)
  read = np.ones(n) @ v
  read = np.concatenate([2 * read.real, -2 * read.imag])
  scale = np.linalg.norm(a, 2)
  for power in range(8):
    expected = np.ones(n) @ np.linalg.matrix_power(a / scale, power) @ b
    actual = read @ np.linalg.matrix_power(blocks / scale, power) @ b_low
    assert_trees_close(actual, expected, scale=np.linalg.norm(b) * np.sqrt(n))


def test_diagonal_initialisations():
  n = 8
  m = np.arange(4)
  assert_trees_close(hippo.s4d_lin(n), np.array([-0.5 + 1j * np.pi * i for i in m]))
  inverse = [-0.5 + 1j * 8 / np.pi * (8 / (2 * i + 1) - 1) for i in m]
  assert_trees_close(hippo.s4d_inv(n), np.array(inverse))
  assert_trees_close(hippo.s4d_legs(n), hippo.nplr_legs(n)[0])


@pytest.mark.parametrize("n", [0, 1, 3, -2])
@pytest.mark.parametrize(
    "make", [hippo.legs, hippo.nplr_legs, hippo.s4d_lin, hippo.s4d_inv, hippo.s4d_legs]
)
def test_a_state_that_is_no_pairs_is_refused(make, n):
  with pytest.raises(ValueError, match=str(n)):
    make(n)
