"""Tests of the GPU kernels of matrix states, interpreted, against the float32 specification."""

import jax
import pytest

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix import gpu
from tests.ops.matrix.kernel_cases import (
    Case,
    assert_close,
    assert_finite_with_extreme_decays,
    assert_float32_states_of_bfloat16_inputs,
    assert_like_the_specification,
    assert_states_are_not_rounded,
    everything,
    kernels,
    make_inputs,
    marked,
)

QUICK = [
    Case(37, scale=True, tail=("skip", "z", "moments"), chunk=32),
    Case(18, gates=(None, 0, 0), low_rank=(0,), joins=(2,), heads=2, groups=1, channels=48,
         decay_rows=1, tail=("moments",)),
]
# Everything at once, in heads of three parts.
WHOLE = Case(40, gates=(None, 0), low_rank=(0,), heads=2, groups=1, channels=48, scale=True,
             tail=("skip", "x", "z", "moments"), rank=20)
SLOW = [
    Case(18, gates=(None, 0, 0), low_rank=(0,), heads=2, groups=1, channels=48, decay_rows=1,
         tail=("moments",)),
    Case(50, gates=(0, 0, 0, 0), joins=(2, 3), scale=True, tail=("skip", "z"), chunk=32),
    Case(257, gates=(None, None, None), joins=(2,), chunk=0, strong=200.0),
    *(Case(time, tail=("x", "z"), scale=True, chunk=32) for time in (1, 33)), WHOLE,
    Case(70, gates=(None, 0, 1), low_rank=(1,), tail=("skip", "x", "z", "moments"), scale=True,
         chunk=64),
    Case(17, heads=6, groups=2, state_size=48),
    Case(257, gates=(None, 0, 0), low_rank=(0,), tail=("skip", "z", "moments"), scale=True,
         chunk=0),
    Case(63, decay_rows=1, strong=20.0, chunk=32),
    Case(17, gates=(0,), heads=1, groups=1, channels=3),
    Case(40, heads=2, groups=2, state_size=160, channels=96, tail=("moments", "z"), resets=False),
]
EXHAUSTIVE = [
    *(Case(time, gates=(None, 0, 0, 1, 1), joins=(2, 4)) for time in (1, 15, 17, 63)),
    Case(37, gates=(None, 0, 0), joins=(2,), state_size=160, resets=False, initial=False),
    *(Case(time, tail=("x", "z"), scale=True, chunk=32) for time in (2, 15, 16, 17, 257)),
    Case(37), Case(130, gates=(None, 0), tail=("moments",), chunk=0),
    Case(33, gates=(0, 1), tail=("skip",), scale=True, initial=False),
    Case(17, groups=4, gates=(None, 0), tail=("moments",)),
    Case(50, gates=(0, 1, 0), low_rank=(0, 1), tail=("skip",), scale=True, chunk=32),
    Case(257, chunk=0, strong=200.0, tail=("z",)),
    Case(63, tail=("z",), resets=False, initial=False),
    Case(17, groups=1, gates=(None, 0), tail=("moments",)),
    Case(17, heads=6, groups=1, state_size=48),
    *(Case(257, resets=resets, chunk=0, strong=5.0, tail=("z",)) for resets in (False, True)),
    Case(257, resets=False, chunk=0, strong=200.0, tail=("z",)),
    Case(97, chunk=64, strong=60.0),
]


@pytest.mark.parametrize("case", marked(QUICK, SLOW, EXHAUSTIVE), ids=str)
def test_outputs_final_state_and_gradients_are_the_references(case):
  assert_like_the_specification(gpu.matrix_finish, case)


@pytest.mark.slow
def test_parts_of_heads_may_be_narrower_in_scans(monkeypatch):
  monkeypatch.setattr(gpu, "_STATE_NUMBERS", 256)
  assert_like_the_specification(gpu.matrix_finish, WHOLE)


@pytest.mark.parametrize(
    ("asked", "time", "chunk"),
    [(0, 2048, 64), (1, 99, 16), (17, 99, 32), (48, 99, 64), (256, 2048, 64), (0, 20, 32)],
)
def test_chunks_are_powers_of_two(asked, time, chunk):
  (sources, _, _), _, _ = make_inputs(Case(time))
  plan = gpu._plan(sources, Epilogue(), asked or gpu.CHUNK, interpret=True)
  assert (plan.chunk, plan.tokens) == (chunk, time)


@pytest.mark.slow
def test_states_are_float32_between_chunks():
  assert_states_are_not_rounded(gpu.matrix_finish)


@pytest.mark.slow
def test_bfloat16_inputs_keep_float32_states():
  case = Case(63, gates=(None, 0, 1), low_rank=(0,), tail=("skip", "z", "moments"), scale=True,
              state_size=16)
  assert_float32_states_of_bfloat16_inputs(gpu.matrix_finish, case, "bfloat16")


@pytest.mark.slow
def test_extreme_decays_stay_finite():
  assert_finite_with_extreme_decays(gpu.matrix_finish, Case(17, gates=(0,), tail=("z",)))


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same():
  # Where the backward pass computes the forward pass again, the first forward pass saves nothing.
  case = Case(33, gates=(None, 0), low_rank=(0,), tail=("skip", "z", "moments"), scale=True)
  inputs = make_inputs(case)
  run = kernels(gpu.matrix_finish, case)
  assert_close(everything(jax.checkpoint(run), *inputs), everything(run, *inputs))
