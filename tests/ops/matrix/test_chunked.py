"""Tests of matrix-state recurrences over chunks against their float32 specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops import resolver
from dense_jax.ops.matrix.reference import matrix_read, matrix_states
from tests.builders import fast_jit, normal
from tests.helpers import assert_trees_close
from tests.ops.sequences import (
    after_last_valid,
    documents,
    everything,
    matrix_float64,
    one_document,
    strong_decays,
)

B, H, P, N, C = 3, 2, 3, 4, 3
ROW = [3, *[7] * 9]
# (length, with documents); without documents, only the masks differ.
CASES = [(1, True), (C + 1, True), (29, True)]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [(time, True) for time in sorted({2, C - 1, C})] + [(C, False), (29, False)]
]
# A CPU has a form of its own of "chunked".
ELSEWHERE = "chunked, elsewhere"
IMPLEMENTATIONS = ["chunked", ELSEWHERE, "associative", "recurrent"]


def _inputs(time, initial=True, rows=B, groups=H):
  return {
      "k": normal(0, B, time, groups, N),
      "v": normal(1, B, time, H, P),
      "q": normal(2, B, time, groups, N),
      "log_decay": -jnp.exp(normal(3, rows, time, H) - 1),
      "initial": normal(4, B, H, P, N) * initial,
  }


def _fast(inputs, segments, implementation, chunk=C):
  platform = "tpu" if implementation == ELSEWHERE else "cpu"
  with resolver.compiling_for(platform):
    form = resolver.matrix_form(implementation.removesuffix(", elsewhere"), chunk)
  states = form(
      inputs["k"], inputs["v"], inputs.get("scale"), inputs["log_decay"], segments,
      inputs["initial"],
  )
  return states.run(inputs["q"])


def _specification(inputs, segments):
  """Reads the reference's states; the final state is that of the last valid token."""
  log_decay = jnp.broadcast_to(inputs["log_decay"], inputs["v"].shape[:3])
  v = inputs["v"] * inputs["scale"][..., None] if "scale" in inputs else inputs["v"]
  states, _ = matrix_states(
      inputs["k"], v, log_decay, segments.resets_BT, inputs["initial"]
  )
  y = jax.vmap(matrix_read, in_axes=1, out_axes=1)(states, inputs["q"])
  return y, after_last_valid(states, inputs["initial"], segments)


@fast_jit
def _compare(inputs, segments):
  """Outputs, final state and gradients of every input, of the specification and of each form."""
  weights = normal(6, *inputs["v"].shape), normal(7, B, H, P, N)
  runs = [_specification, *(functools.partial(_fast, implementation=n) for n in IMPLEMENTATIONS)]
  return [everything(run, inputs, segments, weights) for run in runs]


@pytest.mark.parametrize(("time", "packed"), CASES)
def test_outputs_final_state_and_gradients_are_the_references(time, packed):
  segments = documents(time, ROW) if packed else one_document(time)
  for initial in (False, True):
    expected, *fast = _compare(_inputs(time, initial), segments)
    for actual in fast:
      assert_trees_close(actual, expected)


@pytest.mark.parametrize("packed", [
    pytest.param(False, id="one-document", marks=pytest.mark.slow),
    pytest.param(True, id="documents"),
])
def test_a_decay_that_all_rows_share(packed):
  segments = documents(11, ROW) if packed else one_document(11)
  expected, *fast = _compare(_inputs(11, rows=1), segments)
  assert expected[1]["log_decay"].shape == (1, 11, H)
  for actual in fast:
    assert_trees_close(actual, expected)


@pytest.mark.slow
def test_heads_may_share_keys_and_queries():
  inputs, segments = _inputs(11, groups=1), documents(11, ROW)
  expected, *fast = _compare(inputs, segments)
  for actual in fast:
    assert_trees_close(actual, expected)
  repeated = inputs | {name: jnp.repeat(inputs[name], H, axis=2) for name in "kq"}
  assert_trees_close(_compare(repeated, segments)[0][0], expected[0])


@pytest.mark.slow
def test_values_may_have_a_factor():
  inputs, segments = _inputs(11) | {"scale": jnp.exp(normal(11, B, 11, H))}, documents(11, ROW)
  expected, *fast = _compare(inputs, segments)
  for actual in fast:
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("implementation", ["chunked", "associative"])
def test_chunk_length_changes_nothing(implementation):
  inputs, segments = _inputs(29), documents(29, ROW)
  run = functools.partial(fast_jit, static_argnames=("implementation", "chunk"))(_fast)
  valid = segments.valid_BT[..., None, None]
  expected_y, expected_final = run(inputs, segments, implementation="recurrent", chunk=0)
  for chunk in (7, 100):
    y, final = run(inputs, segments, implementation=implementation, chunk=chunk)
    assert_trees_close((y * valid, final), (expected_y * valid, expected_final))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_decays_stay_finite(implementation):
  inputs = _inputs(11)
  size = jnp.asarray([-50.0, -1e-6, -1e4, -1e-30] * 6)[: 11 * H].reshape(1, 11, H)

  @fast_jit
  def run(inputs):
    def objective(inputs):
      y, final = _fast(inputs, one_document(11), implementation)
      return jnp.sum(y) + jnp.sum(final), (y, final)

    return jax.grad(objective, has_aux=True)(inputs)

  for decay in (size, jnp.full_like(size, -50.0), jnp.full_like(size, -1e-6)):
    for leaf in jax.tree.leaves(run(inputs | {"log_decay": decay})):
      assert np.isfinite(leaf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_keep_float32_states(implementation):
  inputs = _inputs(29)
  low = {name: inputs[name].astype(jnp.bfloat16) for name in "kvq"}
  run = fast_jit(
      lambda inputs: _fast(inputs, one_document(29), implementation)
  )
  actual, expected = run(inputs | low), run(inputs)
  assert [leaf.dtype for leaf in actual] == [jnp.float32, jnp.float32]
  for low_leaf, leaf in zip(actual, expected, strict=True):
    assert_trees_close(low_leaf, leaf, "bfloat16", scale=float(jnp.std(leaf)))


@functools.partial(fast_jit, static_argnames=("implementation", "chunk"))
def _all_of(inputs, segments, weights, implementation, chunk):
  run = functools.partial(_fast, implementation=implementation, chunk=chunk)
  return everything(run, inputs, segments, weights)


def _size(x):
  return float(np.sqrt(np.mean(np.square(x))))


EACH_FORM = pytest.mark.parametrize(("implementation", "chunk"), [
    ("recurrent", 0), ("chunked", 16), ("chunked", 128), ("associative", 64),
    pytest.param("pallas", 128, marks=pytest.mark.slow),
    pytest.param("triton", 64, marks=pytest.mark.slow),
])


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "documents"])
@EACH_FORM
def test_strong_decays_cost_no_digits(implementation, chunk, packed):
  inputs = _inputs(200)
  segments = documents(200, [70, 3, 90, 37]) if packed else one_document(200)
  weights = normal(6, *inputs["v"].shape), normal(7, B, H, P, N)
  for size in (5, 20, 60, 200):
    for share in (0.2, 1.0):
      inputs["log_decay"] = strong_decays(size, B, 200, H, share=share)
      actual = _all_of(inputs, segments, weights, implementation, chunk)
      expected = matrix_float64(inputs, segments, weights)
      for leaf, right in zip(actual[0], expected[0], strict=True):
        assert_trees_close(leaf, right, scale=_size(right))
      scale = max(_size(gradient) for gradient in expected[1].values())
      assert_trees_close(actual[1], expected[1], scale=scale)


@EACH_FORM
def test_gradients_of_strong_decays_have_digits_however_small_they_are(implementation, chunk):
  # The last chunk is padded.
  inputs, segments = _inputs(250), one_document(250)
  weights = normal(6, *inputs["v"].shape), normal(7, B, H, P, N)
  for size in (5, 20, 60):
    inputs["log_decay"] = strong_decays(size, B, 250, H, share=1.0)
    _, actual = _all_of(inputs, segments, weights, implementation, chunk)
    expected = matrix_float64(inputs, segments, weights)[1]["log_decay"]
    assert_trees_close(actual["log_decay"], expected, scale=_size(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_decay_of_zero_clears_the_state(implementation):
  # The log of a zero decay is -inf; in float32, exp(-104) and exp(-1000) are zero too.
  inputs, segments = _inputs(29), one_document(29)
  cleared = (jnp.arange(29) % 7 == 3)[None, :, None]
  weights = normal(6, *inputs["v"].shape), normal(7, B, H, P, N)
  results = [
      _all_of(
          inputs | {"log_decay": jnp.where(cleared, log, inputs["log_decay"])}, segments, weights,
          implementation, 16,
      )
      for log in (-104.0, -1000.0, -jnp.inf)
  ]
  for result in results:
    assert_trees_close(result, results[0])
    gradient = result[1]["log_decay"]
    assert np.all(np.where(cleared, gradient, 0.0) == 0.0)
