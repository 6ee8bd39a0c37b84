"""State matrices that initialise linear time-invariant layers; numpy, float64.

Runs when a model is made, never inside a compiled function. A complex result holds one
member of each conjugate pair, M = N / 2 of them.
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
  """HiPPO-LegS (arXiv 2008.07669, theorem 2, with its 1 / t left out): A_NN and B_N."""
  _check(n)
  root_N = np.sqrt(2 * np.arange(n) + 1.0)
  a_NN = -np.tril(np.outer(root_N, root_N), -1) - np.diag(np.arange(n) + 1.0)
  return a_NN, root_N


def nplr_legs(n: int) -> tuple[Complex, Complex, Complex, Complex]:
  """LegS as a normal matrix plus one of rank one (arXiv 2111.00396, appendix C.1).

  With V's columns and their conjugates as a unitary basis W, and lambda and P likewise
  completed by conjugates: A = W (diag(lambda) - P P^*) W^*.

  Args:
    n: the state size N.

  Returns:
    lambda_M, P_M and B_M in the eigenbasis, and V_NM: the eigenvalues of positive imaginary
    part, in ascending order of it.
  """
  a_NN, b_N = legs(n)
  p_N = np.sqrt(np.arange(n) + 0.5)
  # A + P P^T is -1/2 on the diagonal and skew elsewhere; i times a skew matrix is Hermitian,
  # so that the basis comes out unitary to rounding.
  skew_NN = a_NN + np.outer(p_N, p_N) + 0.5 * np.eye(n)
  imaginary_N, v_NN = np.linalg.eigh(-1j * skew_NN)
  v_NM: Complex = v_NN[:, n // 2 :]
  return -0.5 + 1j * imaginary_N[n // 2 :], v_NM.conj().T @ p_N, v_NM.conj().T @ b_N, v_NM


def s4d_lin(n: int) -> Complex:
  """S4D-Lin, -1/2 + i pi m (arXiv 2206.11893, section 4.2): lambda_M."""
  _check(n)
  return -0.5 + 1j * np.pi * np.arange(n // 2)


def s4d_inv(n: int) -> Complex:
  """S4D-Inv, -1/2 + i N / pi (N / (2m + 1) - 1) (arXiv 2206.11893, section 4.2): lambda_M."""
  _check(n)
  return -0.5 + 1j * n / np.pi * (n / (2 * np.arange(n // 2) + 1) - 1)


def s4d_legs(n: int) -> Complex:
  """S4D-LegS, LegS without its rank-one part (arXiv 2206.11893, section 4.1): lambda_M."""
  return nplr_legs(n)[0]
