"""Tests of input injection's kernels against its formula and JAX's own gradients."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dense_jax.ops.injection import inject
from dense_jax.ops.injection_gpu import gpu_inject
from dense_jax.ops.kernel_check import CheckedNorm
from dense_jax.ops.matmul import matmul
from dense_jax.ops.recurrence import LowRankGate
from tests.builders import fast_jit, normal
from tests.helpers import assert_trees_close

B, T, R = 2, 13, 3
KERNELS = functools.partial(gpu_inject, interpret=True)
# Sources, gates and norm; "one" gate serves all sources.
CASES = {
    "one-source": (1, "one", True), "shared": (2, "one", True), "per-source": (2, "each", True),
    "ungated": (2, "none", True), "no-norm": (2, "each", False),
    "ungated-no-norm": (1, "none", False),
}


def _inputs(case, width, dtype=jnp.float32):
  sources, gates, normed = CASES[case]
  count = {"one": 1, "each": sources, "none": 0}[gates]
  return {
      "own": normal(0, B, T, width).astype(dtype),
      "shallow": [normal(1 + i, B, T, width).astype(dtype) for i in range(sources)],
      "hidden": [normal(11 + i, B, T, R).astype(dtype) for i in range(count)],
      "up": [normal(21 + i, R, width) for i in range(count)],
      "scale": 1 + normal(30, width, scale=0.5) if normed else None,
  }


def _everything(function, inputs, readers=3):
  """Returns the first results and the gradients of a weighted sum of them."""

  def run(inputs):
    gates = [
        LowRankGate(hidden, up, matmul)
        for hidden, up in zip(inputs["hidden"], inputs["up"], strict=True)
    ]
    reads = inputs["shallow"]
    of_reads = gates * len(reads) if len(gates) == 1 else gates or [None] * len(reads)
    norm = None if inputs["scale"] is None else CheckedNorm(inputs["scale"])
    return tuple(function(inputs["own"], reads, of_reads, norm))[:readers]

  def both(inputs):
    results, pullback = jax.vjp(run, inputs)
    cotangents = tuple(
        normal(40 + i, *x.shape).astype(x.dtype) for i, x in enumerate(results)
    )
    return results, pullback(cotangents)[0]

  return fast_jit(both)(inputs)


# Several small blocks of channels, and of two cases large ones.
@pytest.mark.parametrize(("case", "width"), [
    *((case, 6) for case in CASES), ("shared", 1536), ("no-norm", 1536),
])
def test_kernels_and_their_gradients_are_those_of_the_formula(case, width):
  inputs = _inputs(case, width)
  assert_trees_close(_everything(KERNELS, inputs), _everything(inject, inputs))


@pytest.mark.parametrize("readers", [1, 2])
def test_gradients_where_the_own_input_has_no_other_reader(readers):
  inputs = _inputs("one-source", 16)
  assert_trees_close(
      _everything(KERNELS, inputs, readers), _everything(inject, inputs, readers)
  )


def test_kernels_round_once():
  inputs = _inputs("per-source", 32, jnp.bfloat16)
  # Matmuls take both factors in the model's dtype.
  inputs["up"] = [up.astype(jnp.bfloat16).astype(jnp.float32) for up in inputs["up"]]
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
  (rounded, *_), _ = _everything(KERNELS, inputs)
  (right, *_), _ = _everything(inject, exact)
  assert rounded.dtype == jnp.bfloat16
  error = jnp.abs(rounded.astype(jnp.float32) - right)
  # Half a unit in the last place of the sum, which is kept for the norm, and of the result.
  assert jnp.all(error <= 2 * 2**-8 * jnp.abs(right) + 1e-6)


def test_a_token_of_decoding_takes_the_formula():
  inputs = _inputs("ungated", 16)
  own, *shallow = (x[:, 0] for x in (inputs["own"], *inputs["shallow"]))

  def run(own, shallow):
    return KERNELS(own, shallow, [None] * 2, None).fused_E

  assert "pallas_call" not in str(jax.make_jaxpr(run)(own, shallow))
