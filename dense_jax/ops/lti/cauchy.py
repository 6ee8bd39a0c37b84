"""Transfer functions of diagonal-plus-low-rank systems at roots of unity, in real arithmetic.

The discrete system's generating function at z = exp(-i theta), through the bilinear map:

    sum_j z^j c A^j b  =  exp(i theta / 2) dt / 2  c [i sin - cos dt / 2 A]^-1 B

with sin and cos of theta / 2. (The usual formula, with tan(theta / 2), is this one divided by cos,
and is undefined at theta = pi.) The resolvent of A = Lambda - 2 p p^T follows from that of Lambda,
which is a sum over conjugate pairs (arXiv 2111.00396, section 3.3).

Letters of this file alone: F frequencies in a block, Q rows of weights (8), S sine and cosine (2).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.types import Array

# Frequencies per block. Blocks bound the memory of [E, M, F] arrays, forward and backward.
_BLOCK = 64


def _block(
    w_re_EM: Array, w_im_EM: Array, weights_EQM: Array, dt_E: Array, angles_SF: Array
) -> tuple[Array, Array]:
  """Computes the transfer function's real and imaginary part, each [E, F], at a block of angles.

  Args:
    w_re_EM: dt / 2 times the real part of the continuous eigenvalues.
    w_im_EM: dt / 2 times their imaginary part.
    weights_EQM: for each of the products (c, b), (c, p), (p, b), (p, p), the even and the odd
      weight of every pair.
    dt_E: step sizes.
    angles_SF: sine and cosine of theta / 2.
  """
  sin, cos = angles_SF[0][None, None], angles_SF[1][None, None]
  re, im = cos * w_re_EM[..., None], cos * w_im_EM[..., None]
  # The pair's determinant, (i sin - cos w)(i sin - cos w*), from factors that stay accurate at a
  # resonance, where sin is about cos Im w.
  square = re * re
  below, above = im - sin, im + sin
  det_re, det_im = square + below * above, -2 * sin * re
  # Two reciprocals, because the gradient of a single one would square a product near overflow.
  scale = 1 / (square + below * below) * (1 / (square + above * above))
  inverse_EM2F = jnp.stack([det_re * scale, det_im * scale], axis=2)
  batch, pairs = w_re_EM.shape
  sums = jnp.einsum(
      "eqm,emf->eqf", weights_EQM, inverse_EM2F.reshape(batch, pairs, -1),
      precision=jax.lax.Precision.HIGHEST,
  ).reshape(batch, 4, 2, 2, -1)
  sin, cos = angles_SF[0][None], angles_SF[1][None]
  even, odd = sums[:, :, 0], sums[:, :, 1]

  def product(which: int) -> tuple[Array, Array]:
    e, o = even[:, which], odd[:, which]
    return cos * o[:, 0] + sin * e[:, 1], sin * e[:, 0] - cos * o[:, 1]

  (cb_re, cb_im), (cp_re, cp_im), (pb_re, pb_im), (pp_re, pp_im) = map(product, range(4))
  weight = cos * dt_E[:, None]
  one_re, one_im = 1 + weight * pp_re, weight * pp_im  # Re >= 1: Lambda is dissipative.
  weight = weight / (one_re * one_re + one_im * one_im)
  low_re, low_im = cp_re * pb_re - cp_im * pb_im, cp_re * pb_im + cp_im * pb_re
  y_re = cb_re - weight * (low_re * one_re + low_im * one_im)
  y_im = cb_im - weight * (low_im * one_re - low_re * one_im)
  half = 0.5 * dt_E[:, None]
  return half * (cos * y_re - sin * y_im), half * (cos * y_im + sin * y_re)


def truncated_kernel(
    a_re_ME: Array,
    a_im_ME: Array,
    p_NE: Array,
    b_NE: Array,
    dt_E: Array,
    c_NE: Array,
    length: int,
) -> Array:
  """Inverts the bilinear system's transfer function, sampled at `length` roots of unity.

  Args:
    a_re_ME: float32 real part of the continuous eigenvalues, < 0.
    a_im_ME: float32 imaginary part.
    p_NE: float32 low-rank part.
    b_NE: float32 continuous input map.
    dt_E: float32 step sizes > 0.
    c_NE: float32 query. Given (I - A^length)^T c, the result is the kernel c A^j b itself; given
      c, it is that kernel wrapped around `length`.
    length: the number of roots of unity, and of values.

  Returns:
    k_TE, float32.
  """
  frequencies = length // 2 + 1
  blocks = -(-frequencies // _BLOCK)
  size = -(-frequencies // blocks)
  # Beyond the last frequency there is only padding, for which any angle is valid.
  half_F = np.minimum(np.arange(blocks * size) / length, 0.5) * np.pi
  waves = np.stack([np.sin(half_F), np.cos(half_F)]).reshape(2, blocks, size)
  angles = jnp.asarray(np.moveaxis(waves, 1, 0), jnp.float32)

  half_1E = 0.5 * dt_E[None]
  w_re_ME, w_im_ME = half_1E * a_re_ME, half_1E * a_im_ME

  def weights(u_NE: Array, v_NE: Array) -> list[Array]:
    (u_re, u_im), (v_re, v_im) = jnp.split(u_NE, 2), jnp.split(v_NE, 2)
    even = u_re * v_re + u_im * v_im
    return [even, w_im_ME * (u_im * v_re - u_re * v_im) - w_re_ME * even]

  rows = [*weights(c_NE, b_NE), *weights(c_NE, p_NE), *weights(p_NE, b_NE), *weights(p_NE, p_NE)]
  weights_EQM = jnp.moveaxis(jnp.stack(rows), 2, 0)
  block = functools.partial(_block, w_re_ME.T, w_im_ME.T, weights_EQM, dt_E)
  # The backward pass recomputes [E, M, F], block by block.
  re, im = jax.lax.map(jax.checkpoint(block, prevent_cse=False), angles)
  re_EF, im_EF = (jnp.moveaxis(part, 0, 1).reshape(dt_E.shape[0], -1) for part in (re, im))
  spectrum = jax.lax.complex(re_EF[:, :frequencies], im_EF[:, :frequencies])
  return jnp.fft.irfft(spectrum, n=length).T
