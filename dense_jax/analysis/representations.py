"""Figures of representations: similarity, information, rank, and what a linear probe recovers.

Functions take float matrices x_SF of S samples (tokens) and F features (the numbers of a layer's
state or residual stream at that token), and compute in float64 on the host. F may be far larger
than S: what is computed of features alone goes through the S x S matrix of inner products.
"""

import math

import numpy as np

Matrix = np.ndarray
# Of ridge regression, as shares of the mean eigenvalue of x's inner products.
_PENALTIES = np.logspace(-6, 3, 10)


def cosine_similarity(x_SF: Matrix, y_SF: Matrix) -> float:
  """Returns the mean over samples of the cosine of the angle between x and y.

  It depends on which feature is which, and is near zero for unrelated layouts of the features.
  """
  x_SF, y_SF = _float64(x_SF), _float64(y_SF)
  norms = np.linalg.norm(x_SF, axis=1) * np.linalg.norm(y_SF, axis=1)
  return float(np.mean(np.sum(x_SF * y_SF, axis=1) / np.maximum(norms, np.finfo(float).tiny)))


def linear_cka(x_SF: Matrix, y_SG: Matrix) -> float:
  """Returns the linear centred kernel alignment (arXiv 1905.00414), debiased, at most 1.

      CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = x x^T, L = y y^T

  With HSIC's unbiased estimator (Song et al., JMLR 13, 2012, eq. 5), independent features give 0 in
  the mean, also where there are more features than samples: the plain estimator tends to 1 there.
  It may be slightly negative. Identical features give 1, also after rotations and scaling.
  """
  k_SS, l_SS = _gram(x_SF), _gram(y_SG)
  norm = math.sqrt(max(_hsic(k_SS, k_SS), 0) * max(_hsic(l_SS, l_SS), 0))
  return _hsic(k_SS, l_SS) / norm if norm else math.nan


def _gram(x_SF: Matrix) -> Matrix:
  """Returns the inner products of centred samples, with zeros on the diagonal."""
  x_SF = _float64(x_SF)
  x_SF = x_SF - x_SF.mean(axis=0)
  gram_SS = x_SF @ x_SF.T
  np.fill_diagonal(gram_SS, 0)
  return gram_SS


def _hsic(k_SS: Matrix, l_SS: Matrix) -> float:
  """Returns the unbiased estimate of HSIC for two kernel matrices with zero diagonals."""
  count = len(k_SS)
  sums = k_SS.sum() * l_SS.sum() / ((count - 1) * (count - 2))
  crossed = 2 * (k_SS.sum(axis=0) @ l_SS.sum(axis=0)) / (count - 2)
  return float((np.sum(k_SS * l_SS) + sums - crossed) / (count * (count - 3)))


def effective_rank(x_SF: Matrix) -> float:
  """Returns the effective rank: exp of the entropy of the normalised singular values.

      exp(-sum_i p_i log p_i),   p_i = s_i / sum_j s_j        (Roy and Vetterli, EUSIPCO 2007)

  of the centred samples: r for r equal singular values, less if they differ. It is at most S - 1.
  """
  x_SF = _float64(x_SF)
  values = np.linalg.svd(x_SF - x_SF.mean(axis=0), compute_uv=False)
  total = values.sum()
  if not total:
    return 0.0
  shares = values[values > total * np.finfo(float).eps] / total
  return float(np.exp(-np.sum(shares * np.log(shares))))


def gaussian_information(x_SF: Matrix, y_SG: Matrix, components: int = 8) -> float:
  """Estimates the mutual information of two representations in nats, as if they were Gaussian.

      I = -1/2 sum_k log(1 - rho_k^2) - k^2 / (2 S)

  rho are the canonical correlations of the first `components` (k) principal components of each.

  What it is not: principal components beyond k, and all that is not linear, are left out, so that
  it is a lower bound of the information in the mean, if the components are Gaussian. The last term
  removes the bias of estimating k^2 correlations from S samples, to first order; what is left is
  of order k^3 / S^2. Independent samples therefore give about 0, with a standard deviation of
  about k / (S sqrt(2)), and identical ones as much as the precision of float64 lets them.

  Raises:
    ValueError: there are fewer than four samples for a component.
  """
  samples = len(x_SF)
  count = min(components, np.shape(x_SF)[1], np.shape(y_SG)[1])
  if samples < 4 * count:
    raise ValueError(f"{samples} samples are too few for {count} components")
  u_SK, v_SK = _whitened(x_SF, count), _whitened(y_SG, count)
  rho = np.linalg.svd(u_SK.T @ v_SK, compute_uv=False)
  lost = np.maximum(1 - rho**2, np.finfo(float).eps)
  return float(-0.5 * np.sum(np.log(lost)) - u_SK.shape[1] * v_SK.shape[1] / (2 * samples))


def _whitened(x_SF: Matrix, count: int) -> Matrix:
  """Returns orthonormal columns that span the first principal components, at most `count`."""
  x_SF = _float64(x_SF)
  u_SK, values, _ = np.linalg.svd(x_SF - x_SF.mean(axis=0), full_matrices=False)
  return u_SK[:, : min(count, int(np.sum(values > values[0] * 1e-10)))]


def probe_recovery(x_SF: Matrix, y_SG: Matrix) -> float:
  """Returns how much of y a linear map of x recovers on samples that it was not fitted to: R^2.

      R^2 = 1 - |y - W x|^2 / |y - mean(y)|^2

  W is fitted by ridge regression to the first half of the samples, with the penalty of `_PENALTIES`
  that has the least leave-one-out error there, and R^2 is computed on the second half: 1 means that
  y is a linear function of x, and 0 that the mean of y predicts it as well. It may be slightly
  negative.

  Args:
    x_SF: what is given, such as the states of a deep layer.
    y_SG: what is to be recovered, such as those of a shallow one.
  """
  half = len(x_SF) // 2
  x_SF, y_SG = _float64(x_SF), _float64(y_SG)
  x_SF, y_SG = x_SF - x_SF[:half].mean(axis=0), y_SG - y_SG[:half].mean(axis=0)
  # K = Q diag(v) Q^T: the fit of a penalty p is Q diag(v / (v + p)) Q^T y.
  values_S, q_SS = np.linalg.eigh(x_SF[:half] @ x_SF[:half].T)
  values_S = np.maximum(values_S, 0)
  rotated_SG = q_SS.T @ y_SG[:half]
  best: tuple[float, Matrix] | None = None
  for penalty in _PENALTIES * max(values_S.mean(), np.finfo(float).tiny):
    kept_S = values_S / (values_S + penalty)
    leverage_S = (q_SS**2) @ kept_S + 1 / half  # 1 / half is that of the mean.
    missed_SG = (y_SG[:half] - q_SS @ (kept_S[:, None] * rotated_SG)) / (
        1 - np.minimum(leverage_S, 1 - 1e-9))[:, None]
    error = float(np.sum(missed_SG**2))
    if best is None or error < best[0]:
      best = error, q_SS @ (rotated_SG / (values_S + penalty)[:, None])
  assert best is not None
  left = np.sum((y_SG[half:] - (x_SF[half:] @ x_SF[:half].T) @ best[1]) ** 2)
  whole = np.sum((y_SG[half:] - y_SG[half:].mean(axis=0)) ** 2)
  return float(1 - left / whole) if whole else math.nan


def _float64(x: Matrix) -> Matrix:
  return np.asarray(x, dtype=np.float64)
