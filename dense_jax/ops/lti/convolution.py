"""Time-invariant systems as convolutions by FFT, float32.

A convolution computes the read of one query, over rows that are each one document and begin
without a carried state.
"""

import chex
import jax
import jax.numpy as jnp

from dense_jax.types import Array


def fft_length(minimum: int) -> int:
  """Returns the shortest length of at least `minimum` that has no prime factor above 5."""
  length = minimum
  while True:
    rest = length
    for factor in (2, 3, 5):
      while rest % factor == 0:
        rest //= factor
    if rest == 1:
      return length
    length += 1


def _spectrum(x_BTE: Array, length: int) -> tuple[Array, Array]:
  """Returns the real and imaginary part of the zero-padded transform over time, [B, E, F]."""
  spectrum = jnp.fft.rfft(jnp.swapaxes(x_BTE, 1, 2).astype(jnp.float32), n=length)
  return spectrum.real, spectrum.imag


def _signal(re: Array, im: Array, length: int, time: int) -> Array:
  """Inverts `_spectrum`, cut to `time` tokens."""
  return jnp.swapaxes(jnp.fft.irfft(jax.lax.complex(re, im), n=length)[..., :time], 1, 2)


@jax.custom_vjp
def fft_convolution(x_BTE: Array, k_TE: Array) -> Array:
  """Computes y_t = sum over j <= t of k_j x_{t-j}, float32.

  The gradient transforms x and k again instead of keeping their spectra, which would take twice
  the padded size, and needs real transforms only.
  """
  chex.assert_shape(k_TE, x_BTE.shape[1:])
  time = x_BTE.shape[1]
  length = fft_length(2 * time - 1)
  (x_re, x_im), (k_re, k_im) = _spectrum(x_BTE, length), _spectrum(k_TE[None], length)
  return _signal(x_re * k_re - x_im * k_im, x_re * k_im + x_im * k_re, length, time)


def _forward(x_BTE: Array, k_TE: Array) -> tuple[Array, tuple[Array, Array]]:
  return fft_convolution(x_BTE, k_TE), (x_BTE, k_TE)


def _backward(saved: tuple[Array, Array], gradient_BTE: Array) -> tuple[Array, Array]:
  x_BTE, k_TE = saved
  time = x_BTE.shape[1]
  length = fft_length(2 * time - 1)
  (x_re, x_im), (k_re, k_im) = _spectrum(x_BTE, length), _spectrum(k_TE[None], length)
  g_re, g_im = _spectrum(gradient_BTE, length)
  # Correlations: the other factor's spectrum is conjugated.
  x_gradient = _signal(g_re * k_re + g_im * k_im, g_im * k_re - g_re * k_im, length, time)
  k_re = jnp.sum(g_re * x_re + g_im * x_im, axis=0, keepdims=True)
  k_im = jnp.sum(g_im * x_re - g_re * x_im, axis=0, keepdims=True)
  k_gradient = _signal(k_re, k_im, length, time)[0]
  return x_gradient.astype(x_BTE.dtype), k_gradient.astype(k_TE.dtype)


fft_convolution.defvjp(_forward, _backward)
