"""Tests of the selective kernels, interpreted, against the float32 specification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops.diagonal.reference import diagonal_read, diagonal_states
from dense_jax.ops.diagonal.tpu import selective_reads
from dense_jax.ops.diagonal.tpu_kernels import Diagonal
from tests.builders import COMPILER_OPTIONS, normal
from tests.helpers import assert_trees_close
from tests.ops.sequences import after_last_valid, documents, everything, one_document

B, C = 3, 16
# Documents that begin inside chunks and at their borders; one has a single token.
ROW = [3, 13, 1, 15, *[20] * 12]

# Unrolled steps are many small operations, and fusing them takes half of the compilation.
jit = functools.partial(
    jax.jit, compiler_options=COMPILER_OPTIONS | {"xla_disable_hlo_passes": "fusion"}
)


def _source(index, time, state_size, width, gated):
  seed = 10 * index
  return Diagonal(
      dt_BTE=jax.nn.softplus(normal(seed, B, time, width) - 1),
      a_NE=-jnp.exp(normal(seed + 1, state_size, width)),
      x_BTE=normal(seed + 2, B, time, width),
      b_BTN=normal(seed + 3, B, time, state_size),
      c_BTN=normal(seed + 4, B, time, state_size),
      gate_BTE=normal(seed + 5, B, time, width) if gated else None,
      initial_BNE=normal(seed + 6, B, state_size, width),
  )


def _inputs(time, sources, state_size=3, width=32):
  """Makes sources of which every other one has a gate: the first too if their number is even."""
  return {
      "sources": tuple(
          _source(index, time, state_size, width, (index + sources) % 2 == 0)
          for index in range(sources)
      )
  }


def _weights(inputs):
  first = inputs["sources"][0]
  return normal(98, *first.x_BTE.shape), normal(99, *first.initial_BNE.shape)


def _masked(inputs, segments):
  """Returns the sources with dt = 0 in the padding."""
  if segments.valid_BT is None:
    return inputs["sources"]
  valid = segments.valid_BT[..., None]
  return tuple(
      dataclasses.replace(source, dt_BTE=jnp.where(valid, source.dt_BTE, 0))
      for source in inputs["sources"]
  )


def _kernel(inputs, segments, chunk=C):
  return selective_reads(_masked(inputs, segments), segments.resets_BT, chunk=chunk, interpret=True)


def _specification(inputs, segments):
  """Sums gated reads of the reference's states; the final state is the first source's."""
  sources = _masked(inputs, segments)
  y, finals = 0.0, []
  for source in sources:
    states, _ = diagonal_states(
        source.dt_BTE, source.a_NE, source.x_BTE, source.b_BTN, segments.resets_BT,
        source.initial_BNE,
    )
    read = jax.vmap(diagonal_read, in_axes=1, out_axes=1)(states, source.c_BTN)
    y += read if source.gate_BTE is None else read * source.gate_BTE
    finals.append(after_last_valid(states, source.initial_BNE, segments))
  return y, finals[0]


@functools.partial(jit, static_argnames=("run", "chunk"))
def _run(run, inputs, segments, **chunk):
  """Returns outputs, final state and gradients of every input."""
  return everything(functools.partial(run, **chunk), inputs, segments, _weights(inputs))


def _segments(time, packed):
  return documents(time, ROW) if packed else one_document(time)


@pytest.mark.parametrize(
    ("time", "sources", "packed", "state_size", "width"),
    [
        (1, 1, False, 3, 32),
        (17, 2, True, 3, 32),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (2, 1, True, 3, 32),
                (15, 1, False, 3, 32),
                (16, 1, True, 3, 32),
                (63, 3, True, 16, 32),
                (63, 1, False, 16, 32),
                (257, 2, True, 3, 32),
                (33, 1, True, 3, 384),  # Three tiles of 128 channels.
                (33, 1, False, 3, 512),  # Two of 256.
            ]
        ),
    ],
)
def test_outputs_final_state_and_gradients_are_the_references(
    time, sources, packed, state_size, width
):
  inputs, segments = _inputs(time, sources, state_size, width), _segments(time, packed)
  assert_trees_close(_run(_kernel, inputs, segments), _run(_specification, inputs, segments))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 4, 48])
def test_chunk_length_changes_nothing(chunk):
  inputs, segments = _inputs(83, 1), _segments(83, True)
  assert_trees_close(
      _run(_kernel, inputs, segments, chunk=chunk), _run(_specification, inputs, segments)
  )


@pytest.mark.slow
def test_bfloat16_inputs_keep_float32_states():
  inputs, segments = _inputs(33, 2), _segments(33, True)
  low = {
      "sources": tuple(
          dataclasses.replace(
              source,
              **{
                  name: getattr(source, name).astype(jnp.bfloat16)
                  for name in ("dt_BTE", "x_BTE", "b_BTN", "c_BTN")
              },
          )
          for source in inputs["sources"]
      )
  }
  # The specification gets the same rounded numbers in float32, so there is no other error.
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
  outputs, gradients = _run(_kernel, low, segments)
  expected, expected_gradients = _run(_specification, rounded, segments)
  assert_trees_close(outputs, expected)
  for gradient, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(low), strict=True):
    assert gradient.dtype == leaf.dtype
  for source, wanted in zip(gradients["sources"], expected_gradients["sources"], strict=True):
    for name in ("a_NE", "gate_BTE", "initial_BNE"):
      assert_trees_close(getattr(source, name), getattr(wanted, name))
    for name in ("dt_BTE", "x_BTE", "b_BTN", "c_BTN"):
      assert_trees_close(getattr(source, name), getattr(wanted, name), "bfloat16")


@pytest.mark.slow
def test_extreme_steps_stay_finite():
  inputs = _inputs(33, 1)
  (source,) = inputs["sources"]
  size = jnp.asarray([1e4, 0.0, 1e-30, 1e-9] * 8)[None, None]
  rate = -jnp.asarray([1e-3, 1.0, 1e3])[:, None]
  inputs["sources"] = (dataclasses.replace(
      source,
      dt_BTE=jnp.broadcast_to(size, source.dt_BTE.shape),
      a_NE=jnp.broadcast_to(rate, source.a_NE.shape),
  ),)
  for leaf in jax.tree.leaves(_run(_kernel, inputs, _segments(33, False))):
    assert np.isfinite(leaf).all()


def test_only_a_pass_that_is_differentiated_keeps_states():
  sources = _inputs(33, 2)["sources"]
  saved = f"f32[{B},3,3,128]"  # Three chunks, N = 3, one tile.

  def run(sources):
    return selective_reads(sources, None, chunk=C, interpret=True)

  assert saved not in str(jax.make_jaxpr(run)(sources))
  assert saved in str(jax.make_jaxpr(lambda sources: jax.vjp(run, sources)[0])(sources))


def test_shapes_that_do_not_agree_are_refused():
  (source,) = _inputs(5, 1)["sources"]
  with pytest.raises(AssertionError, match="shape"):
    selective_reads([dataclasses.replace(source, c_BTN=source.c_BTN[:, :4])], None)
