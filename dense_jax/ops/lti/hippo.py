"""HiPPO state matrices that initialise linear time-invariant layers; numpy, float64.

Used when a model is made, never inside a compiled function. Complex results hold one member of
each of the M = N / 2 conjugate pairs.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Real: TypeAlias = NDArray[np.float64]
Complex: TypeAlias = NDArray[np.complexfloating]


def _check(n: int) -> None:
  if n < 2 or n % 2:
    raise ValueError(f"a state of conjugate pairs has an even size of at least 2, not {n}")


def legs(n: int) -> tuple[Real, Real]:
  """Returns A_NN and B_N of HiPPO-LegS (arXiv 2008.07669, theorem 2, without the factor 1 / t)."""
  _check(n)
  root_N = np.sqrt(2 * np.arange(n) + 1.0)
  a_NN = -np.tril(np.outer(root_N, root_N), -1) - np.diag(np.arange(n) + 1.0)
  return a_NN, root_N


def nplr_legs(n: int) -> tuple[Complex, Complex, Complex, Complex]:
  """Splits LegS into a normal and a rank-one matrix (arXiv 2111.00396, appendix C.1).

  Let W be the unitary matrix of V's columns and their conjugates, and lambda and P likewise
  completed by their conjugates. Then A = W (diag(lambda) - P P^*) W^*.

  Args:
    n: the state size N, even.

  Returns:
    lambda_M, P_M and B_M in the eigenbasis, and the eigenvectors V_NM, for the eigenvalues with
    positive imaginary part, in ascending order of it.

  Raises:
    ValueError: n is odd or less than 2.
  """
  a_NN, b_N = legs(n)
  p_N = np.sqrt(np.arange(n) + 0.5)
  # A + P P^T is -1/2 on the diagonal and skew-symmetric elsewhere. i times a skew-symmetric matrix
  # is Hermitian, so the computed basis is unitary up to rounding.
  skew_NN = a_NN + np.outer(p_N, p_N) + 0.5 * np.eye(n)
  imaginary_N, v_NN = np.linalg.eigh(-1j * skew_NN)
  v_NM: Complex = v_NN[:, n // 2 :]
  return -0.5 + 1j * imaginary_N[n // 2 :], v_NM.conj().T @ p_N, v_NM.conj().T @ b_N, v_NM


def s4d_lin(n: int) -> Complex:
  """Returns lambda_M of S4D-Lin, -1/2 + i pi m (arXiv 2206.11893, section 4.2)."""
  _check(n)
  return -0.5 + 1j * np.pi * np.arange(n // 2)


def s4d_inv(n: int) -> Complex:
  """Returns lambda_M of S4D-Inv, -1/2 + i N / pi (N / (2m + 1) - 1) (arXiv 2206.11893, 4.2)."""
  _check(n)
  return -0.5 + 1j * n / np.pi * (n / (2 * np.arange(n // 2) + 1) - 1)


def s4d_legs(n: int) -> Complex:
  """Returns lambda_M of S4D-LegS, LegS without its rank-one part (arXiv 2206.11893, 4.1)."""
  return nplr_legs(n)[0]
