"""Tests of the TPU kernels of matrix states, interpreted, against the float32 specification."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dense_jax.ops import resolver
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matmul import matmul
from dense_jax.ops.matrix import tpu, tpu_plan
from dense_jax.ops.recurrence import LowRankGate, Read
from tests.builders import fast_jit, normal
from tests.helpers import assert_trees_close
from tests.ops.matrix.kernel_cases import (
    B,
    Case,
    assert_finite_with_extreme_decays,
    assert_float32_states_of_bfloat16_inputs,
    assert_like_the_specification,
    assert_states_are_not_rounded,
    kernels,
    make_inputs,
    marked,
    specification,
)
from tests.ops.sequences import one_document

P = 8
# A chunk of 4 is rounded up to 16.
_case = functools.partial(Case, gates=(None, 0), chunk=4)

QUICK = [
    _case(63, scale=True, tail=("skip", "z", "moments")),
    _case(17, gates=(None, 0, 0, 1), low_rank=(0,), joins=(2,), heads=2, groups=1, state_size=16,
          decay_rows=1, tail=("moments",)),
    _case(16, gates=(0,), groups=4, resets=False, tail=("x", "z")),
    _case(97, gates=(None,), chunk=64, strong=60.0),
]
SLOW = [
    _case(17, gates=(None, 0, 1), low_rank=(0,), heads=2, groups=1, state_size=16, decay_rows=1,
          initial=False, tail=("moments",)),
    _case(33, gates=(0, 0, 0, 0), joins=(2, 3), scale=True, tail=("skip", "z")),
    _case(257, gates=(None, None, None), joins=(2,), chunk=0, strong=200.0),
    _case(33, gates=(None, 0, 1), low_rank=(0, 1), scale=True, tail=("skip", "z", "moments"),
         initial=False),
    *(_case(time) for time in (1, 257)), _case(17, groups=4, gates=(0,)),
    _case(17, heads=6, groups=2, state_size=16, gates=(None,)),
    _case(63, gates=(0, None), decay_rows=1),
    _case(257, gates=(None, 0, 1), heads=2, groups=1, state_size=16, chunk=0),
    _case(63, decay_rows=1, strong=20.0),
    _case(17, gates=(0,), heads=1, groups=1, channels=3),
    _case(17, scale=True, tail=("x", "z", "moments"), heads=1, groups=1, channels=3),
]
EXHAUSTIVE = [
    *(_case(time, gates=(None, 0, 0, 1, 1), joins=(2, 4)) for time in (1, 15, 16, 63)),
    _case(33, gates=(None, 0, 0), joins=(2,), resets=False, initial=False),
    *(_case(33, scale=scale, tail=tail, groups=1, state_size=16, resets=False)
      for scale, tail in (
          (True, ()), (False, ("skip", "moments")), (True, ("x",)), (False, ("z",)))),
    *(_case(time) for time in (2, 15, 16, 17)),
    *(_case(time, resets=False) for time in (17, 63, 257)),
    _case(17, gates=(0, 1, 2)), _case(63, gates=(None,), decay_rows=1, resets=False),
    _case(257, chunk=0, strong=200.0), _case(257, gates=(None,), chunk=50),
    _case(17, groups=1, gates=(0,)), _case(17, gates=(None, None, None)),
    _case(17, heads=6, groups=1, state_size=16, gates=(None,)),
    *(_case(257, resets=resets, chunk=0, strong=5.0) for resets in (False, True)),
    _case(257, resets=False, chunk=0, strong=200.0),
]


@pytest.mark.parametrize("case", marked(QUICK, SLOW, EXHAUSTIVE), ids=str)
def test_outputs_final_state_and_gradients_are_the_references(case):
  assert_like_the_specification(tpu.matrix_finish, case)


def test_without_a_gradient_the_outputs_are_the_same():
  case = _case(33, gates=(0,))
  inputs, resets, _ = make_inputs(case)
  runs = kernels(tpu.matrix_finish, case), specification
  outputs = [fast_jit(run)(*inputs, resets) for run in runs]
  assert_trees_close(*outputs)


def test_a_recurrence_finishes_as_another_implementation_does():
  time, heads, state_size, segments = 21, 2, 16, one_document(21)
  values, by_head = normal(2, B, time, heads * P), (B, time, heads)
  queries = [normal(seed, B, time, 1, state_size) for seed in (4, 5)]
  # With the values themselves as x, as in a layer without input injection, and with another array.
  epilogues = [
      Epilogue(normal(6, heads), x, normal(7, *values.shape), moments=True)
      for x in (values, normal(8, *values.shape))
  ]

  def outputs(implementation):
    own, other = (
        resolver.matrix_form(implementation, 0)(
            normal(seed, B, time, 1, state_size), v, jax.nn.softplus(normal(seed + 20, *by_head)),
            -jnp.exp(normal(seed + 30, *by_head)), segments, None,
        )
        for seed, v in ((40, values), (41, normal(9, *values.shape)))
    )
    gate = LowRankGate(normal(10, B, time, 5), normal(11, 5, heads * P), matmul)
    reads = [Read(other, queries[1], gate)]
    return [own.finish(queries[0], reads, epilogue) for epilogue in epilogues]

  actual, expected = (
      fast_jit(functools.partial(outputs, name))() for name in ("pallas", "chunked")
  )
  assert_trees_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "groups", "channels"), [(2, 2, 256), (4, 1, 64), (2, 1, 256)])
def test_what_blocks_of_rows_share_is_summed(heads, groups, channels, monkeypatch):
  # The smallest possible blocks: a part of one head's rows, or some of a group's heads.
  monkeypatch.setattr(tpu_plan, "VMEM_BYTES", 0)
  case = _case(
      17, gates=(0,), low_rank=(0,), heads=heads, groups=groups, channels=channels, scale=True,
      tail=("skip", "z", "moments"),
  )
  assert_like_the_specification(tpu.matrix_finish, case)


@pytest.mark.slow
def test_states_are_float32_between_chunks():
  assert_states_are_not_rounded(tpu.matrix_finish)


@pytest.mark.slow
def test_bfloat16_inputs_keep_float32_states():
  case = _case(63, state_size=16, scale=True, tail=("skip", "z", "moments"))
  assert_float32_states_of_bfloat16_inputs(tpu.matrix_finish, case, "float32")


@pytest.mark.slow
def test_extreme_decays_stay_finite():
  assert_finite_with_extreme_decays(tpu.matrix_finish, _case(17, gates=(0,)))
