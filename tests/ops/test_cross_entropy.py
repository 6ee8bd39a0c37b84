"""Tests of the chunked cross-entropy: value, gradients, and no array of all logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from dense_jax.ops.cross_entropy import (
    LogitForm,
    chunked_cross_entropy,
    summed_cross_entropy,
    sums_at_once,
    token_cross_entropy,
)
from tests.builders import fast_jit, normal, random_tokens
from tests.helpers import assert_trees_close

B, D, V = 2, 4, 11


def _inputs(time, vocab=V):
  return normal(0, B, time, D), normal(1, D, vocab), random_tokens(2, B, time)


def _direct(hidden, head, targets):
  return token_cross_entropy(hidden @ head, targets)


FORMS = [LogitForm(), LogitForm(sums_at_once), LogitForm(again=True)]
each_form = pytest.mark.parametrize("form", FORMS, ids=["kept", "at once", "again"])


def _chunked(chunk, form=FORMS[0]):
  return functools.partial(summed_cross_entropy, z_loss=0.1, chunk=chunk, form=form)


def _direct_sums(hidden, head, targets, weights):
  nll, log_z = _direct(hidden, head, targets)
  return jnp.sum(weights * (nll + 0.1 * log_z**2)), jnp.sum(weights * nll)


def _value_and_gradients(form, hidden, head, targets):
  weights = normal(3, *targets.shape)

  def objective(hidden, head):
    total, nll = form(hidden, head, targets, weights)
    return 3 * total, nll

  return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(hidden, head)


@each_form
@pytest.mark.parametrize(("time", "chunk"), [(1, 4), (4, 4), (5, 4), (13, 4), (13, 13), (7, 100)])
def test_chunked_equals_direct_with_gradients(time, chunk, form):
  inputs = _inputs(time)

  @fast_jit
  def run(*inputs):
    tokens = chunked_cross_entropy(*inputs, chunk=chunk, form=form), _direct(*inputs)
    forms = _chunked(chunk, form), _direct_sums
    return tokens, [_value_and_gradients(form, *inputs) for form in forms]

  for actual, expected in run(*inputs):
    assert_trees_close(actual, expected)


def test_only_the_objective_has_a_gradient():
  inputs, weights = _inputs(5), normal(3, B, 5)
  gradients = jax.grad(lambda *x: _chunked(2)(*x, weights)[1], argnums=(0, 1))(*inputs)
  assert all(not leaf.any() for leaf in gradients)


def test_it_is_the_definition():
  hidden, head, targets = _inputs(5)
  nll, log_z = chunked_cross_entropy(hidden, head, targets, chunk=2)
  probability = jax.nn.softmax(hidden @ head)
  picked = jnp.take_along_axis(probability, targets[..., None], axis=-1)[..., 0]
  assert_trees_close(nll, -jnp.log(picked))
  assert_trees_close(log_z, jnp.log(jnp.sum(jnp.exp(hidden @ head), axis=-1)))


@each_form
def test_large_logits_stay_finite(form):
  hidden, head, targets = _inputs(5)
  (value, outputs), gradients = _value_and_gradients(
      _chunked(2, form), 1e4 * hidden, head, targets
  )
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, outputs, gradients)))


def _largest_array(text: str, types: str) -> int:
  """Returns the size of the largest floating-point array in a jaxpr or an HLO module."""
  shapes = re.findall(rf"\b(?:{types})\[([\d,]+)\]", text)
  return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_holds_all_logits(dtype):
  time, vocab = 24, 50
  hidden, head, targets = _inputs(time, vocab)
  hidden = hidden.astype(dtype)

  def largest(form):
    run = functools.partial(_value_and_gradients, form)
    jaxpr = str(jax.make_jaxpr(run)(hidden, head, targets))
    program = fast_jit(run).lower(hidden, head, targets).compile().as_text()
    return (
        _largest_array(jaxpr, "f16|bf16|f32|f64"), _largest_array(program, "f16|bf16|f32|f64")
    )

  all_logits = B * time * vocab
  assert max(largest(_chunked(6))) < all_logits
  assert min(largest(_direct_sums)) >= all_logits  # The check does find such an array.


def test_bfloat16_hidden_has_float32_losses_near_the_float32_ones():
  hidden, head, targets = _inputs(13)
  low = hidden.astype(jnp.bfloat16)
  actual = chunked_cross_entropy(low, head, targets, chunk=4)
  assert [leaf.dtype for leaf in actual] == [jnp.float32, jnp.float32]
  expected = _direct(hidden, head, targets)
  for low_leaf, leaf in zip(actual, expected, strict=True):
    assert_trees_close(low_leaf, leaf, "bfloat16", scale=float(jnp.std(leaf)))
  # Logits are summed in float32, so the only error is the rounding of the inputs.
  rounded = _direct(
      low.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32), targets
  )
  assert_trees_close(actual, rounded)
