"""The rates of a card, and single recurrences beside rivals: cases of `gpu`."""

import functools

import jax
import jax.numpy as jnp

from dense_jax.ops.resolver import diagonal_form, matrix_form
from dense_jax.types import Array, PyTree
from experiments.benchmarks import common
from experiments.benchmarks.common import Size

REPEATS = 10
IN_A_ROW = 16


def rates(*, toy: bool) -> dict[str, float]:
  """Measures the ceilings of the estimate: a large matmul's FLOP/s, and a copy's bytes/s."""
  size = 128 if toy else 8192
  # Random numbers: a card multiplies equal ones faster, for it switches fewer bits.
  matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  long = jax.random.normal(jax.random.key(1), (16 * size * size,), jnp.bfloat16)

  # Many in one program: a launch from Python takes as long as a quarter of one of them.
  @jax.jit
  def multiply(x: Array) -> Array:
    return jax.lax.fori_loop(0, IN_A_ROW, lambda _, y: (x @ y) / size**0.5, x)

  @jax.jit
  def copy(x: Array) -> Array:
    return jax.lax.fori_loop(0, IN_A_ROW, lambda _, y: y + 1, x)

  multiplied = common.timed(lambda: multiply(matrix))
  copied = common.timed(lambda: copy(long))
  multiplied(), copied()
  return {
      "matmul_flops_per_second": IN_A_ROW * 2 * size**3 / common.median(multiplied, REPEATS),
      "copied_bytes_per_second": IN_A_ROW * 2 * long.nbytes / common.median(copied, REPEATS),
  }


def operation(name: str, *, toy: bool) -> dict[str, float]:
  """Measures forward and backward passes of one recurrence, at the size of op_rival.py's.

  Args:
    name: "ssd" (matrix states of mamba2) or "scan" (diagonal states of mamba).
    toy: whether the sizes are those of a smoke test.
  """
  batch, time, heads, channels, size = (1, 64, 2, 8, 8) if toy else (16, 2048, 32, 64, 128)
  width, states = heads * channels, 4 if toy else 16
  keys = iter(jax.random.split(jax.random.key(0), 4))
  segments = common.batch(
      common.config("mamba2", Size(32, 1, 64, batch, time)), documents=1
  ).segments

  def normal(*shape: int) -> Array:
    return jax.random.normal(next(keys), shape, jnp.bfloat16)

  def ssd(k: Array, v: Array, q: Array, log_decay: Array) -> Array:
    return matrix_form("auto", 0)(k, v, None, log_decay, segments, None).run(q)[0]

  def scan(x: Array, b: Array, c: Array, dt: Array) -> Array:
    a_NE = -jnp.broadcast_to(1.0 + jnp.arange(states)[:, None], (states, width))
    return diagonal_form("auto", 0)(dt, a_NE, x, b, segments, None).run(c)[0]

  inputs: tuple[Array, ...]
  if name == "ssd":
    inputs = (normal(batch, time, 1, size), normal(batch, time, heads, channels),
              normal(batch, time, 1, size), jnp.full((batch, time, heads), -0.1))
  else:
    inputs = (normal(batch, time, width), normal(batch, time, states),
              normal(batch, time, states), jnp.full((batch, time, width), 0.01))
  function = ssd if name == "ssd" else scan

  @jax.jit
  def gradients(inputs: PyTree) -> PyTree:
    return jax.grad(lambda inputs: jnp.sum(function(*inputs) ** 2))(inputs)

  call = common.timed(functools.partial(gradients, inputs))
  call()
  return {"seconds": common.median(call, REPEATS)}
