"""Figures of representations: similarity, information, rank, and what a linear probe recovers.

All compute in float64 on the host. The numbers of a layer's state are far more than the tokens
that are looked at, so that all but the cosine goes through the S x S matrix of inner products,
which `Features` computes once for all pairs of layers.
"""

import dataclasses
import functools
import math

import numpy as np

Matrix = np.ndarray
# Of ridge regression, as shares of the mean eigenvalue of x's inner products.
_PENALTIES = np.logspace(-6, 3, 10)


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """A representation: S samples (tokens) with F features (the numbers of a state, for example).

  Attributes:
    x_SF: the features.
  """

  x_SF: Matrix

  @functools.cached_property
  def float64_SF(self) -> Matrix:
    """The features in float64."""
    return np.asarray(self.x_SF, dtype=np.float64)

  @functools.cached_property
  def gram_SS(self) -> Matrix:
    """Inner products of the samples, centred."""
    x_SF = self.float64_SF - self.float64_SF.mean(axis=0)
    return x_SF @ x_SF.T

  @functools.cached_property
  def norms_S(self) -> Matrix:
    """The samples' lengths."""
    return np.linalg.norm(self.float64_SF, axis=1)

  @functools.cached_property
  def kernel_SS(self) -> Matrix:
    """Inner products of the samples, centred, with zeros on the diagonal."""
    return self.gram_SS - np.diag(np.diag(self.gram_SS))

  @functools.cached_property
  def own_hsic(self) -> float:
    """HSIC with itself, at least 0."""
    return max(_hsic(self.kernel_SS, self.kernel_SS), 0)

  @functools.cached_property
  def spectrum(self) -> tuple[Matrix, Matrix]:
    """Singular values of the centred samples, the largest first, and their left vectors [S, K].

    Values that the rounding of inner products hides, below about 1e-6 of the largest, are left out.
    """
    squares, u_SS = np.linalg.eigh(self.gram_SS)
    largest = max(squares[-1], 0.0)
    kept = squares > largest * len(squares) * np.finfo(float).eps
    return np.sqrt(squares[kept][::-1]), u_SS[:, kept][:, ::-1]

  @functools.cached_property
  def half_gram_SS(self) -> Matrix:
    """Inner products of the samples less the mean of their first half."""
    half = len(self.gram_SS) // 2
    to_mean_S = self.gram_SS[:half].mean(axis=0)
    return self.gram_SS - to_mean_S - to_mean_S[:, None] + to_mean_S[:half].mean()

  @functools.cached_property
  def half_spectrum(self) -> tuple[Matrix, Matrix]:
    """Eigenvalues and eigenvectors of the inner products of the first half."""
    half = len(self.gram_SS) // 2
    values, vectors = np.linalg.eigh(self.half_gram_SS[:half, :half])
    return np.maximum(values, 0), vectors


def cosine_similarity(x: Features, y: Features) -> float:
  """Returns the mean over samples of the cosine of the angle between x and y.

  It depends on which feature is which, and is near zero for unrelated layouts of the features.
  """
  norms_S = x.norms_S * y.norms_S
  products_S = np.einsum("sf,sf->s", x.float64_SF, y.float64_SF)
  return float(np.mean(products_S / np.maximum(norms_S, np.finfo(float).tiny)))


def linear_cka(x: Features, y: Features) -> float:
  """Returns the linear centred kernel alignment (arXiv 1905.00414), debiased, at most 1.

      CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = x x^T, L = y y^T

  With HSIC's unbiased estimator (Song et al., JMLR 13, 2012, eq. 5), independent features give 0 in
  the mean, also where there are more features than samples: the plain estimator tends to 1 there.
  It may be slightly negative. Identical features give 1, also after rotations and scaling.
  """
  norm = math.sqrt(x.own_hsic * y.own_hsic)
  return _hsic(x.kernel_SS, y.kernel_SS) / norm if norm else math.nan


def _hsic(k_SS: Matrix, l_SS: Matrix) -> float:
  """Returns the unbiased estimate of HSIC for two kernel matrices with zero diagonals."""
  count = len(k_SS)
  sums = k_SS.sum() * l_SS.sum() / ((count - 1) * (count - 2))
  crossed = 2 * (k_SS.sum(axis=0) @ l_SS.sum(axis=0)) / (count - 2)
  return float((np.sum(k_SS * l_SS) + sums - crossed) / (count * (count - 3)))


def effective_rank(x: Features) -> float:
  """Returns the effective rank: exp of the entropy of the normalised singular values.

      exp(-sum_i p_i log p_i),   p_i = s_i / sum_j s_j        (Roy and Vetterli, EUSIPCO 2007)

  of the centred samples: r for r equal singular values, less if they differ. It is at most S - 1.
  """
  values, _ = x.spectrum
  if not len(values):
    return 0.0
  shares = values / values.sum()
  return float(np.exp(-np.sum(shares * np.log(shares))))


def gaussian_information(x: Features, y: Features, components: int = 8) -> float:
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
  samples = len(x.x_SF)
  count = min(components, x.x_SF.shape[1], y.x_SF.shape[1])
  if samples < 4 * count:
    raise ValueError(f"{samples} samples are too few for {count} components")
  (_, u_SK), (_, v_SK) = x.spectrum, y.spectrum
  u_SK, v_SK = u_SK[:, :count], v_SK[:, :count]
  rho = np.linalg.svd(u_SK.T @ v_SK, compute_uv=False)
  lost = np.maximum(1 - rho**2, np.finfo(float).eps)
  return float(-0.5 * np.sum(np.log(lost)) - u_SK.shape[1] * v_SK.shape[1] / (2 * samples))


def probe_recovery(x: Features, y: Features) -> float:
  """Returns how much of y a linear map of x recovers on samples that it was not fitted to: R^2.

      R^2 = 1 - |y - W x|^2 / |y - mean(y)|^2

  W is fitted by ridge regression to the first half of the samples, with the penalty of `_PENALTIES`
  that has the least leave-one-out error there, and R^2 is computed on the second half: 1 means that
  y is a linear function of x, and 0 that the mean of y predicts it as well. It may be slightly
  negative.

  Args:
    x: what is given, such as the states of a deep layer.
    y: what is to be recovered, such as those of a shallow one.
  """
  half = len(x.x_SF) // 2
  # K = Q diag(v) Q^T: a penalty p fits Q diag(v / (v + p)) Q^T y, and predicts
  # x' x^T Q diag(1 / (v + p)) Q^T y elsewhere. y enters by its inner products alone.
  values_S, q_SS = x.half_spectrum
  y_SS = y.half_gram_SS
  rotated_SS = q_SS.T @ y_SS[:half, :half] @ q_SS
  best = math.inf, 0.0
  for penalty in _PENALTIES * max(values_S.mean(), np.finfo(float).tiny):
    leverage_S = (q_SS**2) @ (values_S / (values_S + penalty)) + 1 / half  # 1 / half: the mean's.
    missed_SS = q_SS * (penalty / (values_S + penalty))
    squares_S = np.einsum("st,st->s", missed_SS @ rotated_SS, missed_SS)
    error = float(np.sum(squares_S / (1 - np.minimum(leverage_S, 1 - 1e-9)) ** 2))
    best = min(best, (error, penalty))
  map_SS = (x.half_gram_SS[half:, :half] @ q_SS / (values_S + best[1])) @ q_SS.T
  left = (
      np.trace(y_SS[half:, half:]) - 2 * np.sum(map_SS * y_SS[half:, :half])
      + np.sum((map_SS @ y_SS[:half, :half]) * map_SS)
  )
  rest_SS = y_SS[half:, half:]
  whole = np.trace(rest_SS) - rest_SS.sum() / len(rest_SS)
  return float(1 - left / whole) if whole else math.nan
