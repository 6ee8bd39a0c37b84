"""Linear time-invariant systems, one per channel: S4D (diagonal) and S4 (diagonal plus rank one).

    h_t = A h_{t-1} + b x_t        y_t = c h_t

All arithmetic is real float32. A state of M conjugate pairs is N = 2 M real numbers: the real
parts of one member of each pair, then the imaginary parts. A query is a real functional of these
numbers; 2 Re(C h) is the query [2 Re C, -2 Im C]. Multiplying by a complex number acts on a pair
as a 2 x 2 rotation and scaling, and multiplying by its conjugate as the transpose.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.ops.lti.cauchy import truncated_kernel
from dense_jax.types import Array

Pair: TypeAlias = tuple[Array, Array]
"""The real and the imaginary part of a complex array."""
Advance: TypeAlias = Callable[[Array], Array]
Stepper: TypeAlias = Callable[[Array, Array], Array]

# Bilinear: eigenvalues with a squared radius below this count as zero; their angle has no gradient.
_TINY = 1e-30
# A quarter turn in two parts; the first has so few bits that products with it are exact.
_QUARTER = (np.float32(1.5703125), np.float32(np.pi / 2 - 1.5703125))


def _pair(x_NE: Array) -> Pair:
  re, im = jnp.split(x_NE, 2, axis=-2)
  return re, im


def _join(x: Pair) -> Array:
  return jnp.concatenate(x, axis=-2)


def _times(x: Pair, y: Pair) -> Pair:
  return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _conjugate(x: Pair) -> Pair:
  return x[0], -x[1]


def _inverse(x: Pair) -> Pair:
  square = x[0] * x[0] + x[1] * x[1]
  return x[0] / square, -x[1] / square


def contract(formula: str, *arrays: Array) -> Array:
  """Contracts in full float32, as powers of A would amplify the errors of lower precision."""
  return jnp.einsum(formula, *arrays, precision=jax.lax.Precision.HIGHEST)


def _block_matrix(x_ME: Pair) -> Array:
  """Returns the pairs' 2 x 2 blocks as one real matrix a_ENN."""
  re, im = (part.T[:, :, None] * jnp.eye(part.shape[0], dtype=part.dtype)[None] for part in x_ME)
  return jnp.block([[re, -im], [im, re]])


def _log_polar(w: Pair, discretization: str) -> tuple[Array, Array, Array]:
  """Computes the log radius (<= 0) and the angle of the discrete eigenvalue.

  The rounding error of a float32 angle grows with the angle, and multiples of the angle multiply
  it. So the angle is two numbers: whole quarter turns, and a remainder of at most an eighth of a
  turn.

  Args:
    w: dt a, [M, E].
    discretization: "zoh", exp(w), or "bilinear", (1 + w / 2) / (1 - w / 2).

  Returns:
    The log radius, the quarter turns (whole numbers) and the remainder in radians.
  """
  if discretization == "zoh":
    quarters = jnp.round(w[1] * np.float32(2 / np.pi))
    return w[0], quarters, (w[1] - quarters * _QUARTER[0]) - quarters * _QUARTER[1]
  re, im = 0.5 * w[0], 0.5 * w[1]
  top, bottom = (1 + re) ** 2 + im**2, (1 - re) ** 2 + im**2
  # A slow mode's radius is just below 1, where log1p is accurate; a fast mode's may be near 0.
  change = 4 * re / bottom
  slow = change > -0.5
  zero = top < _TINY
  fast_log = jnp.log(jnp.where(zero, _TINY, top)) - jnp.log(bottom)
  log_radius = 0.5 * jnp.where(slow, jnp.log1p(jnp.where(slow, change, 0)), fast_log)
  # x + i y is the eigenvalue times a positive number; the larger part tells the nearest axis.
  x, y = (1 - im) * (1 + im) - re * re, 2 * im
  upright = jnp.abs(y) > jnp.abs(x)
  axis = jnp.where(upright, y, x)
  rest = jnp.arctan(jnp.where(upright, -x, y) / jnp.where(zero, 1, axis))
  return log_radius, jnp.where(upright, jnp.sign(y), 1 - jnp.sign(x)), rest


def _multiples(j: Array, quarters: Array, rest: Array) -> Array:
  """Returns j times an angle of `_log_polar`, modulo whole turns, in radians."""
  # `high` keeps so few bits of the remainder that j * high is exact, up to j = 4096.
  rest = rest * np.float32(2 / np.pi)
  high = jax.lax.stop_gradient(jnp.round(rest * 4096) / 4096)
  whole = j * (0.25 * (quarters - 4 * jnp.round(0.25 * quarters)) + 0.25 * high)
  fraction = jax.lax.stop_gradient(whole - jnp.round(whole))
  return np.float32(2 * np.pi) * fraction + np.float32(np.pi / 2) * (j * (rest - high))


def _exp_quotient(w: Pair) -> Pair:
  """Computes (exp(w) - 1) / w, with a gradient that is accurate for small w too."""
  near = w[0] * w[0] + w[1] * w[1] < 0.25
  # The series for small w; the next term is below float32's rounding.
  small = (jnp.where(near, w[0], 0), jnp.where(near, w[1], 0))
  series: Pair = (jnp.ones_like(w[0]), jnp.zeros_like(w[1]))
  for divisor in range(9, 1, -1):
    re, im = _times(series, small)
    series = (1 + re / divisor, im / divisor)
  large = (jnp.where(near, -1, w[0]), jnp.where(near, 0, w[1]))
  radius = jnp.exp(large[0])
  # exp(w) - 1, without subtracting two numbers near 1.
  difference = (
      jnp.expm1(large[0]) * jnp.cos(large[1]) - 2 * jnp.sin(0.5 * large[1]) ** 2,
      radius * jnp.sin(large[1]),
  )
  closed = _times(difference, _inverse(large))
  return jnp.where(near, series[0], closed[0]), jnp.where(near, series[1], closed[1])


class System(Protocol):
  """The operations of a system that the recurrences use."""

  @property
  def b_NE(self) -> Array:
    """The continuous input map, float32."""

  def dense(self) -> tuple[Array, Array]:
    """Returns the discrete system as real matrices a_ENN and b_EN; for tests and analysis."""

  def stepper(self) -> Stepper:
    """Returns a step (h_BNE, x_BE) -> the next h_BNE, discretised once for use in a loop."""

  def input_powers(self, length: int) -> Array:
    """Computes v_CNE: A^j b for j = 0 .. length - 1."""

  def query_powers(self, c_EN: Array, length: int) -> Array:
    """Computes r_CNE: (A^T)^j c for j = 1 .. length."""

  def advance(self, length: int) -> Advance:
    """Returns the map h_BNE -> A^length h_BNE."""

  def kernel(self, c_EN: Array, length: int) -> Array:
    """Computes the convolution kernel k_TE: c A^j b for j = 0 .. length - 1."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalSystem:
  """S4D (arXiv 2206.11893): a diagonal A.

  Powers of an eigenvalue are computed from its log radius and angle.

  Attributes:
    a_re_ME: float32 real part of the continuous eigenvalues, < 0.
    a_im_ME: float32 imaginary part.
    dt_E: float32 step sizes > 0.
    b_NE: float32 continuous input map.
    discretization: "zoh" or "bilinear".
  """

  a_re_ME: Array
  a_im_ME: Array
  dt_E: Array
  b_NE: Array
  discretization: str = dataclasses.field(metadata={"static": True})

  def _w(self) -> Pair:
    dt_1E = self.dt_E[None]
    return dt_1E * self.a_re_ME, dt_1E * self.a_im_ME

  def _eigenvalue_powers(self, exponents: np.ndarray) -> Pair:
    """Returns the discrete eigenvalues to the power of each exponent, [C, M, E]."""
    log_radius, quarters, rest = _log_polar(self._w(), self.discretization)
    j = jnp.asarray(exponents, jnp.float32)[:, None, None]
    radius, phase = jnp.exp(j * log_radius[None]), _multiples(j, quarters[None], rest[None])
    return radius * jnp.cos(phase), radius * jnp.sin(phase)

  def _change(self) -> Pair:
    """Returns the discrete eigenvalues minus one, [M, E]."""
    log_radius, quarters, rest = _log_polar(self._w(), self.discretization)
    half = 0.5 * _multiples(jnp.ones_like(rest), quarters, rest)
    shrunk, sin = jnp.expm1(log_radius), jnp.sin(half)
    radius = 1 + shrunk
    return shrunk - 2 * radius * sin * sin, 2 * radius * sin * jnp.cos(half)

  def _b(self) -> Array:
    """Returns the discrete input map b_NE."""
    w = self._w()
    if self.discretization == "zoh":
      factor = _exp_quotient(w)
    else:
      factor = _inverse((1 - 0.5 * w[0], -0.5 * w[1]))
    return self.dt_E[None] * _join(_times(factor, _pair(self.b_NE)))

  def _queries(self, c_EN: Array, exponents: np.ndarray) -> Array:
    """Returns (A^T)^j c for each exponent j, [C, N, E]."""
    c_re, c_im = _pair(c_EN.T[None])
    return _join(_times(_conjugate(self._eigenvalue_powers(exponents)), (c_re, c_im)))

  def dense(self) -> tuple[Array, Array]:
    """See `System`: a_ENN, b_EN."""
    re, im = self._eigenvalue_powers(np.ones(1))
    return _block_matrix((re[0], im[0])), self._b().T

  def stepper(self) -> Stepper:
    """See `System`: (h_BNE, x_BE) -> h_BNE."""
    (re, im), b_NE = self._change(), self._b()

    def step(h_BNE: Array, x_BE: Array) -> Array:
      u_BNE = b_NE[None] * x_BE.astype(jnp.float32)[:, None]
      return h_BNE + (_join(_times((re[None], im[None]), _pair(h_BNE))) + u_BNE)

    return step

  def input_powers(self, length: int) -> Array:
    """See `System`: v_CNE."""
    return _join(_times(self._eigenvalue_powers(np.arange(length)), _pair(self._b()[None])))

  def query_powers(self, c_EN: Array, length: int) -> Array:
    """See `System`: r_CNE."""
    return self._queries(c_EN, 1 + np.arange(length))

  def advance(self, length: int) -> Advance:
    """See `System`: h_BNE -> h_BNE."""
    power = self._eigenvalue_powers(np.full(1, length))
    return lambda h_BNE: _join(_times(power, _pair(h_BNE)))

  def kernel(self, c_EN: Array, length: int) -> Array:
    """See `System`: k_TE, from about sqrt(length) powers each of input and query."""
    low = _low_digit(length)
    queries_GNE = self._queries(c_EN, low * np.arange(-(-length // low)))
    k_GCE = contract("gne,cne->gce", queries_GNE, self.input_powers(low))
    return k_GCE.reshape(-1, k_GCE.shape[-1])[:length]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DplrSystem:
  """S4 (arXiv 2111.00396): A = Lambda - P P^*, discretised bilinearly.

  Summed over conjugate pairs, P P^* acts as 2 p p^T on the real state. By the Woodbury identity,
  the discrete A is again block-diagonal plus rank one, Lambda' - g q^T, so a step costs O(N).
  Powers of A follow from powers of Lambda' and L steps of one vector:

      A^L  =  Lambda'^L - sum_{i < L} Lambda'^(L-1-i) g (q^T A^i)

  Attributes:
    a_re_ME: float32 real part of Lambda, < 0.
    a_im_ME: float32 imaginary part.
    p_NE: float32 low-rank part, [Re P; Im P].
    dt_E: float32 step sizes > 0.
    b_NE: float32 continuous input map.
  """

  a_re_ME: Array
  a_im_ME: Array
  p_NE: Array
  dt_E: Array
  b_NE: Array

  def _blocks(self, b_NE: Array) -> DiagonalSystem:
    """Returns the diagonal system of Lambda with the given input map."""
    return DiagonalSystem(self.a_re_ME, self.a_im_ME, self.dt_E, b_NE, "bilinear")

  def _discrete(self) -> tuple[Pair, Array, Array, Array]:
    """Returns Lambda' - I (pairs [M, E]), g_NE, q_NE and b_NE, where A = Lambda' - g q^T."""
    dt_1E = self.dt_E[None]
    w = 0.5 * dt_1E * self.a_re_ME, 0.5 * dt_1E * self.a_im_ME
    resolvent = _inverse((1 - w[0], -w[1]))
    p = _pair(self.p_NE)
    right_NE = _join(_times(resolvent, p))
    left_NE = _join(_times(_conjugate(resolvent), p))
    scale_1E = dt_1E / (1 + dt_1E * jnp.sum(self.p_NE * right_NE, axis=0, keepdims=True))
    b_NE = _join(_times(resolvent, _pair(self.b_NE)))
    read_1E = jnp.sum(self.p_NE * b_NE, axis=0, keepdims=True)
    b_NE = dt_1E * (b_NE - scale_1E * right_NE * read_1E)
    change = _times((2 * w[0], 2 * w[1]), resolvent)
    return change, 2 * scale_1E * right_NE, left_NE, b_NE

  def _transposed_step(self) -> Advance:
    """Returns the map x_NE -> A^T x_NE."""
    change, g_NE, q_NE, _ = self._discrete()

    def step(x_NE: Array) -> Array:
      read_1E = jnp.sum(g_NE * x_NE, axis=0, keepdims=True)
      return x_NE + (_join(_times(_conjugate(change), _pair(x_NE))) - q_NE * read_1E)

    return step

  def _low_rank_power(self, length: int) -> tuple[Pair, Array, Array]:
    """Returns Lambda'^L (pairs [M, E]), g_CNE and q_CNE, where A^L = Lambda'^L - sum_C g q^T."""
    _, g_NE, q_NE, _ = self._discrete()
    blocks = self._blocks(g_NE)
    powers = blocks._eigenvalue_powers(length - 1 - np.arange(length))
    g_CNE = _join(_times(powers, _pair(g_NE[None])))
    re, im = blocks._eigenvalue_powers(np.full(1, length))
    return (re[0], im[0]), g_CNE, _iterate(self._transposed_step(), q_NE, length)

  def dense(self) -> tuple[Array, Array]:
    """See `System`: a_ENN, b_EN."""
    (re, im), g_NE, q_NE, b_NE = self._discrete()
    return _block_matrix((1 + re, im)) - g_NE.T[:, :, None] * q_NE.T[:, None, :], b_NE.T

  def stepper(self) -> Stepper:
    """See `System`: (h_BNE, x_BE) -> h_BNE."""
    (re, im), g_NE, q_NE, b_NE = self._discrete()

    def step(h_BNE: Array, x_BE: Array) -> Array:
      read_B1E = jnp.sum(q_NE[None] * h_BNE, axis=1, keepdims=True)
      change_BNE = _join(_times((re[None], im[None]), _pair(h_BNE))) - g_NE[None] * read_B1E
      return h_BNE + (change_BNE + b_NE[None] * x_BE.astype(jnp.float32)[:, None])

    return step

  def input_powers(self, length: int) -> Array:
    """See `System`: v_CNE."""
    step, b_NE = self.stepper(), self._discrete()[3]
    zero_1E = jnp.zeros_like(self.dt_E)[None]
    return _iterate(lambda v_NE: step(v_NE[None], zero_1E)[0], b_NE, length)

  def query_powers(self, c_EN: Array, length: int) -> Array:
    """See `System`: r_CNE."""
    step = self._transposed_step()
    return _iterate(step, step(c_EN.T), length)

  def advance(self, length: int) -> Advance:
    """See `System`: h_BNE -> h_BNE."""
    a_ENN = self._power(length)
    return lambda h_BNE: contract("enk,bke->bne", a_ENN, h_BNE)

  def _power(self, length: int) -> Array:
    """Returns A^length, a_ENN, from steps of a vector or, if length > 2 N, by squaring."""
    if length <= 2 * self.b_NE.shape[0]:
      power, g_CNE, q_CNE = self._low_rank_power(length)
      return _block_matrix(power) - contract("cne,cke->enk", g_CNE, q_CNE)
    half_ENN = self._power(length // 2)
    a_ENN = contract("enk,ekm->enm", half_ENN, half_ENN)
    return contract("enk,ekm->enm", a_ENN, self.dense()[0]) if length % 2 else a_ENN

  def _leap(self, length: int) -> Advance:
    """Returns the map x_NE -> (A^T)^length x_NE."""
    (re, im), g_CNE, q_CNE = self._low_rank_power(length)

    def leap(x_NE: Array) -> Array:
      read_CE = contract("cne,ne->ce", g_CNE, x_NE)
      kept_NE = _join(_times((re, -im), _pair(x_NE)))
      return kept_NE - contract("cne,ce->ne", q_CNE, read_CE)

    return leap

  def kernel(self, c_EN: Array, length: int) -> Array:
    """See `System`: k_TE, from Cauchy sums at `length` roots of unity."""
    # The sums give the kernel wrapped around `length`; the query c - (A^T)^length c undoes that.
    # About sqrt(length) leaps and as many steps cost O(N length); squaring A would cost O(N^3).
    low, last_NE = _low_digit(length), c_EN.T
    last_NE = _repeat(self._leap(low), last_NE, length // low)
    last_NE = _repeat(self._transposed_step(), last_NE, length % low)
    return truncated_kernel(
        self.a_re_ME, self.a_im_ME, self.p_NE, self.b_NE, self.dt_E, c_EN.T - last_NE, length
    )


def _low_digit(length: int) -> int:
  """Returns a power of two near the square root of `length`."""
  return 1 << (length.bit_length() // 2)


def _iterate(step: Advance, first_NE: Array, length: int) -> Array:
  """Returns first, step(first), step(step(first)), ..., `length` values, [C, N, E]."""

  def body(x_NE: Array, _: None) -> tuple[Array, Array]:
    return step(x_NE), x_NE

  return jax.lax.scan(body, first_NE, None, length=length)[1]


def _repeat(step: Advance, x_NE: Array, times: int) -> Array:
  """Applies `step` to x `times` times."""
  return jax.lax.scan(lambda x, _: (step(x), None), x_NE, None, length=times)[0]
