"""Tests of products of activations and parameters: values, gradients, dtypes, forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops.cpu import cpu_matmul
from dense_jax.ops.matmul import gpu_matmul, matmul
from tests.builders import normal
from tests.helpers import assert_trees_close


@pytest.mark.parametrize("product", [matmul, cpu_matmul])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients(product, dtype):
  x, kernel, weight = normal(0, 2, 3, 4).astype(dtype), normal(1, 4, 5), normal(2, 2, 3, 5)

  def objective(x, kernel):
    y = product(x, kernel)
    assert y.dtype == x.dtype
    return jnp.sum(y.astype(jnp.float32) * weight)

  by_x, by_kernel = jax.grad(objective, argnums=(0, 1))(x, kernel)
  x64, kernel64 = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  assert_trees_close(product(x, kernel).astype(jnp.float32), x64 @ kernel64, dtype)
  assert_trees_close(by_x.astype(jnp.float32), np.asarray(weight) @ kernel64.T, dtype)
  expected = np.einsum("bti,bto->io", x64, np.asarray(weight, np.float64))
  assert by_kernel.dtype == jnp.float32
  assert_trees_close(by_kernel, expected, dtype)


def test_a_kernels_gradient_is_not_rounded_to_bfloat16():
  # 256 + 1 needs nine bits, more than bfloat16 has.
  x = jnp.asarray([[256.0], [1.0]], jnp.bfloat16)
  gradient = jax.grad(lambda kernel: jnp.sum(matmul(x, kernel).astype(jnp.float32)))
  assert gradient(jnp.ones((1, 1)))[0, 0] == 257


def test_float32_products_have_forward_mode_derivatives():
  x, kernel, dx = normal(0, 3, 4), normal(1, 4, 5), normal(2, 3, 4)
  _, tangent = jax.jvp(lambda x: matmul(x, kernel), (x,), (dx,))
  assert_trees_close(tangent, dx @ kernel)


@pytest.mark.parametrize("product", [matmul, cpu_matmul])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_keeps_products_sees_them(product, dtype):
  x, kernel = normal(0, 3, 4).astype(dtype), normal(1, 4, 4)
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

  def loss(kernel):
    return jnp.sum(jnp.sin(product(jnp.sin(product(x, kernel)), kernel)).astype(jnp.float32))

  def products(loss):
    return str(jax.make_jaxpr(jax.grad(loss))(kernel)).count("dot_general[")

  without = products(loss)
  assert products(jax.checkpoint(loss, policy=policy)) == without
  assert products(jax.checkpoint(loss)) > without


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gpu_form_is_the_same_product(rows, dtype):
  x, kernel = normal(0, rows, 5).astype(dtype), normal(1, 5, 4)
  actual = gpu_matmul(x, kernel)
  assert actual.dtype == x.dtype
  assert_trees_close(actual.astype(jnp.float32), matmul(x, kernel).astype(jnp.float32), dtype)
