"""Tests that kernels of matrix states refuse arrays whose shapes do not fit each other."""

import jax.numpy as jnp
import pytest

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix import gpu, tpu
from tests.helpers import changed
from tests.ops.matrix.kernel_cases import Case, make_inputs

CASE = Case(20, gates=(None, 0), low_rank=(0,), tail=("skip", "x", "z"))


CHANGES = {
    "one source's decays are shared": lambda sources, gates, epilogue, resets: (
        [sources[0], changed(sources[1], log_decay_BTH=lambda x: x[:1])], gates, epilogue, resets),
    "a source is shorter": lambda sources, gates, epilogue, resets: (
        [sources[0], changed(sources[1], v_BTE=lambda x: x[:, :9])], gates, epilogue, resets),
    "a gate of heads": lambda sources, gates, epilogue, resets: (
        sources, [jnp.ones((2, 20, 4))], epilogue, resets),
    "a gate's rank": lambda sources, gates, epilogue, resets: (
        sources, [changed(gates[0], up_RE=lambda x: x[:3])], epilogue, resets),
    "one row of resets": lambda sources, gates, epilogue, resets: (
        sources, gates, epilogue, resets[:1]),
    "skip of channels": lambda sources, gates, epilogue, resets: (
        sources, gates, changed(epilogue, skip=lambda x: jnp.ones(32)), resets),
    "x without skip": lambda sources, gates, epilogue, resets: (
        sources, gates, Epilogue(x=epilogue.x), resets),
    "z of heads": lambda sources, gates, epilogue, resets: (
        sources, gates, changed(epilogue, z=lambda x: x[..., :4]), resets),
}


@pytest.mark.parametrize("finish", [gpu.matrix_finish, tpu.matrix_finish], ids=["gpu", "tpu"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_arrays_that_do_not_fit_are_refused(finish, change):
  (sources, gates, epilogue), resets, _ = make_inputs(CASE)
  sources, gates, epilogue, resets = change(sources, gates, epilogue, resets)
  with pytest.raises(AssertionError):
    finish(sources, gates, resets, epilogue, interpret=True)
