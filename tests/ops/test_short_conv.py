"""Tests of the short convolution against a loop: documents, tails, padding, single steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.batch import Segments
from dense_jax.ops.cpu import cpu_delays
from dense_jax.ops.short_conv import convolve, delays_by_padding, short_conv, short_conv_step
from dense_jax.ops.short_conv_gpu import gpu_convolve
from tests.builders import fast_jit, normal, packed
from tests.helpers import assert_trees_close

B, T, E = 3, 9, 2
# A row that continues a document; documents shorter than the taps; an empty row.
PACKED = packed([[2, 5, 2], [1, 1, 3], []], time=T, first=[3, 0, 0])


FUNCTIONS = {
    "padding": functools.partial(convolve, delays=delays_by_padding),
    "cpu": functools.partial(convolve, delays=cpu_delays),
    "gpu": functools.partial(gpu_convolve, axis=None, interpret=True),
}


def _inputs(taps, time=T, width=E):
  return {
      "x": normal(0, B, time, width), "kernel": normal(1, taps, width), "bias": normal(2, width),
      "tail": normal(3, B, taps - 1, width),
  }


def _run(inputs, segments, function="padding"):
  return short_conv(
      inputs["x"], inputs["kernel"], inputs["bias"], segments, inputs.get("tail"),
      FUNCTIONS[function],
  )


def _loop(inputs, segments):
  """Computes the convolution token by token, from a list of the document's inputs."""
  x, kernel, bias, tail = (np.asarray(inputs[name]) for name in ("x", "kernel", "bias", "tail"))
  taps = kernel.shape[0]
  positions = np.broadcast_to(np.asarray(segments.positions_BT), x.shape[:2])
  ids = None if segments.ids_BT is None else np.asarray(segments.ids_BT)
  y, last = np.full(x.shape, np.nan), np.zeros_like(tail)
  for row in range(x.shape[0]):
    seen = list(tail[row])
    for t in range(x.shape[1]):
      if ids is not None and ids[row, t] == 0:
        continue
      if ids is not None and positions[row, t] == 0:
        seen = [np.zeros_like(bias)] * (taps - 1)
      seen.append(x[row, t])
      c = bias + sum(kernel[taps - 1 - j] * seen[-1 - j] for j in range(taps))
      y[row, t] = c / (1 + np.exp(-c))
    last[row] = seen[-(taps - 1):]
  return y, last


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("segments", [PACKED, Segments(jnp.arange(T)[None])], ids=["packed", "row"])
def test_it_is_the_plain_loop(segments, taps):
  inputs = _inputs(taps)
  y, tail = fast_jit(_run)(inputs, segments)
  expected_y, expected_tail = _loop(inputs, segments)
  valid = ~np.isnan(expected_y)
  assert_trees_close(np.asarray(y)[valid], expected_y[valid])
  assert_trees_close(tail, expected_tail)


@fast_jit
def _at_every_split(inputs, segments):
  """Computes outputs and last tail in two parts, [:t] and [t:], for every t."""
  valid = segments.valid_BT[..., None]
  results = []
  for split in range(T):  # The first is the whole.
    outputs, tail = [], inputs["tail"]
    for begin, end in ((0, split), (split, T)):
      if begin < end:
        part = jax.tree.map(lambda leaf, a=begin, b=end: leaf[:, a:b], segments)
        y, tail = _run(inputs | {"x": inputs["x"][:, begin:end], "tail": tail}, part)
        outputs.append(y)
    results.append((jnp.concatenate(outputs, axis=1) * valid, tail))
  return results


def test_whole_equals_parts_at_every_split():
  whole, *parts = _at_every_split(_inputs(4), PACKED)
  assert len(parts) == T - 1
  for part in parts:
    assert_trees_close(part, whole)


@pytest.mark.parametrize("time", [1, 2, 3, 7])
def test_delays_on_a_cpu_are_the_others(time):
  x_BTE, tail_BWE = normal(0, B, time, E), normal(1, B, 3, E)
  expected = delays_by_padding(x_BTE, tail_BWE)
  past = np.concatenate([tail_BWE, x_BTE], axis=1)
  for back in range(4):
    np.testing.assert_array_equal(expected[back], past[:, 3 - back :][:, :time])
  assert_trees_close(cpu_delays(x_BTE, tail_BWE), expected)


@fast_jit
def _step_by_step(inputs):
  tail, outputs = inputs["tail"], []
  for t in range(T):
    y, tail = short_conv_step(inputs["x"][:, t], inputs["kernel"], inputs["bias"], tail)
    outputs.append(y)
  return jnp.stack(outputs, 1), tail


def test_single_steps_equal_the_sequence():
  inputs = _inputs(4)
  expected = _run(inputs, Segments(jnp.arange(T)[None]))
  assert_trees_close(_step_by_step(inputs), expected)


def test_padding_leaves_the_tail_of_the_last_valid_tokens():
  inputs = _inputs(4)
  _, tail = _run(inputs, packed([[9], [2], [6]], time=T))
  x = inputs["x"]
  assert_trees_close(tail, jnp.stack([
      x[0, 6:9], jnp.concatenate([jnp.zeros((1, E)), x[1, :2]]), x[2, 3:6],
  ]))


@pytest.mark.parametrize("tail", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("time, lengths", [
    (37, [[2, 30, 5], [1, 1, 9], []]), (2, None),
    pytest.param(300, [[37, 250, 8], [290], [1, 2, 1, 255]], marks=pytest.mark.slow),
])
def test_gradients_by_the_kernel_are_those_of_the_plain_form(time, lengths, tail):
  inputs = _inputs(4, time, 6)
  if not tail:
    del inputs["tail"]
  segments = Segments(jnp.arange(time)[None])
  if lengths is not None:
    segments = packed(lengths, time=time, first=[3, 0, 0])
  weights = normal(5, B, time, 6), normal(6, B, 3, 6)

  @functools.partial(jax.jit, static_argnums=0)
  def run(function, inputs):
    def loss(inputs):
      results = _run(inputs, segments, function)
      return sum(jnp.sum(w * x) for w, x in zip(weights, results, strict=True)), results

    return jax.grad(loss, has_aux=True)(inputs)

  assert_trees_close(run("gpu", inputs), run("padding", inputs))


def test_gradients_stop_at_documents_and_padding():
  inputs = _inputs(4)
  weight = normal(5, B, T, E)

  @fast_jit
  def gradients(inputs):
    def loss(inputs):
      y, tail = _run(inputs, PACKED)
      return jnp.sum((y * weight)[0, 2:7]) + 0 * jnp.sum(tail)

    return jax.grad(loss)(inputs)

  by = gradients(inputs)
  assert np.all(by["x"][0, 2:7] != 0)
  assert np.all(np.delete(np.asarray(by["x"])[0], np.s_[2:7], axis=0) == 0)
  assert np.all(by["tail"] == 0)


def test_the_tail_has_the_inputs_dtype():
  inputs = _inputs(4)
  low = inputs | {"x": inputs["x"].astype(jnp.bfloat16)}
  y, tail = _run(low, PACKED)
  assert (y.dtype, tail.dtype) == (jnp.bfloat16, jnp.bfloat16)
  expected, _ = _run(inputs, PACKED)
  valid = PACKED.valid_BT[..., None]
  assert_trees_close(y * valid, expected * valid, "bfloat16", scale=float(jnp.std(expected)))
