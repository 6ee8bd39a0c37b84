"""Tests of the selective diagonal recurrence against its float32 specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops import resolver
from dense_jax.ops.diagonal.cpu import CpuRecurrentDiagonal
from dense_jax.ops.diagonal.form import DiagonalForm
from dense_jax.ops.diagonal.reference import diagonal_read, diagonal_states
from dense_jax.ops.diagonal.sequence import AssociativeDiagonal, RecurrentDiagonal
from tests.builders import fast_jit, normal
from tests.helpers import assert_trees_close
from tests.ops.sequences import after_last_valid, documents, everything, one_document

B, E, N, C = 3, 4, 3, 3
ROW = [3, *[7] * 9]
# (length, with documents); without documents, only the masks differ.
CASES = [(1, True), (C + 1, True), (29, True)]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [(time, True) for time in sorted({2, C - 1, C})] + [(C, False), (29, False)]
]
IMPLEMENTATIONS = [AssociativeDiagonal, RecurrentDiagonal, CpuRecurrentDiagonal]


def _inputs(time, initial=True):
  return {
      "dt": jax.nn.softplus(normal(0, B, time, E) - 1),
      "a": -jnp.exp(normal(1, N, E)),
      "x": normal(2, B, time, E),
      "b": normal(3, B, time, N),
      "c": normal(4, B, time, N),
      "initial": normal(5, B, N, E) * initial,
  }


def _fast(inputs, segments, implementation, chunk=C):
  form = DiagonalForm(implementation, chunk)
  states = form(
      inputs["dt"], inputs["a"], inputs["x"], inputs["b"], segments, inputs["initial"]
  )
  return states.run(inputs["c"])


def _specification(inputs, segments):
  """Reads the reference's states; the final state is that of the last valid token."""
  states, _ = diagonal_states(
      inputs["dt"], inputs["a"], inputs["x"], inputs["b"], segments.resets_BT, inputs["initial"]
  )
  y = jax.vmap(diagonal_read, in_axes=1, out_axes=1)(states, inputs["c"])
  return y, after_last_valid(states, inputs["initial"], segments)


@fast_jit
def _compare(inputs, segments):
  """Outputs, final state and gradients of every input, of the specification and of each form."""
  weights = normal(6, *inputs["x"].shape), normal(7, *inputs["initial"].shape)
  runs = [_specification, *(functools.partial(_fast, implementation=n) for n in IMPLEMENTATIONS)]
  return [everything(run, inputs, segments, weights) for run in runs]


@pytest.mark.parametrize(("time", "packed"), CASES)
def test_outputs_final_state_and_gradients_are_the_references(time, packed):
  segments = documents(time, ROW) if packed else one_document(time)
  for initial in (False, True):
    expected, *fast = _compare(_inputs(time, initial), segments)
    for actual in fast:
      assert_trees_close(actual, expected)


@pytest.mark.parametrize("width", [E, E - 1])
def test_one_row_alone_is_the_same(width):
  """On a CPU, one row with an even number of channels is scanned as two rows."""
  inputs = {
      name: x if name in "bc" else x[..., :width] for name, x in _inputs(29).items()
  }
  inputs |= {name: x[:1] for name, x in inputs.items() if name != "a"}
  segments = jax.tree.map(lambda x: x[:1], documents(29, ROW))
  expected, *fast = _compare(inputs, segments)
  for actual in fast:
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunk_length_changes_nothing(implementation):
  inputs, segments = _inputs(29), documents(29, ROW)

  @functools.partial(fast_jit, static_argnames="chunk")
  def run(inputs, chunk):
    return _fast(inputs, segments, implementation, chunk)

  expected = run(inputs, 100)
  for chunk in (0, 7):
    assert_trees_close(run(inputs, chunk), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_state_after_the_last_token_alone(implementation):
  inputs, segments = _inputs(29), documents(29, ROW)
  states = DiagonalForm(implementation, C)(
      inputs["dt"], inputs["a"], inputs["x"], inputs["b"], segments, inputs["initial"]
  )
  alone = fast_jit(lambda states: states.after_last())(states)
  assert_trees_close(alone, fast_jit(lambda states: states.run(inputs["c"])[1])(states))


def test_the_workaround_for_one_row_is_a_cpus_alone():
  with resolver.compiling_for("tpu"):
    assert resolver.diagonal_form("recurrent", 0) == DiagonalForm(RecurrentDiagonal, 0)
  with resolver.compiling_for("cpu"):
    assert resolver.diagonal_form("recurrent", 0) == DiagonalForm(CpuRecurrentDiagonal, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_steps_stay_finite(implementation):
  inputs = _inputs(11)
  inputs["a"] = -jnp.asarray([1e-3, 1.0, 1e3])[:, None] * jnp.ones((N, E))
  size = jnp.asarray([0.0, 1e-30, 1e-9, 1e4])[None, None]
  inputs["dt"] = jnp.broadcast_to(jnp.roll(size, 1, axis=-1), inputs["dt"].shape)

  @fast_jit
  def run(inputs):
    def objective(inputs):
      y, final = _fast(inputs, one_document(11), implementation)
      return jnp.sum(y) + jnp.sum(final), (y, final)

    return jax.grad(objective, has_aux=True)(inputs)

  for leaf in jax.tree.leaves(run(inputs)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_keep_float32_states(implementation):
  inputs = _inputs(29)
  low = {name: inputs[name].astype(jnp.bfloat16) for name in "xbc"}
  run = fast_jit(
      lambda inputs: _fast(inputs, one_document(29), implementation)
  )
  actual, expected = run(inputs | low), run(inputs)
  assert [leaf.dtype for leaf in actual] == [jnp.float32, jnp.float32]
  for low_leaf, leaf in zip(actual, expected, strict=True):
    assert_trees_close(low_leaf, leaf, "bfloat16", scale=float(jnp.std(leaf)))
  # The only error is the rounding of the inputs.
  rounded = {name: value.astype(jnp.float32) for name, value in low.items()}
  assert_trees_close(actual, run(inputs | rounded))
