"""Tests of the times of a GPU's kernels; without a GPU there are none."""

import jax.numpy as jnp
import pytest

from experiments.benchmarks import kernel_times


@pytest.mark.parametrize(("name", "kind"), [
    ("loop_add_fusion_12", "loop_add_fusion"), ("chunks_backward_kernel__1",
    "chunks_backward_kernel"), ("read_kernel", "read_kernel"), ("nvjet_64x5_2x1", "nvjet_64x5_2x1"),
])
def test_instances_of_a_kernel_are_one_kind(name, kind):
  assert kernel_times.kind(name) == kind


def test_a_processor_has_no_kernels():
  assert kernel_times.trace(lambda: jnp.ones(3).block_until_ready()) == {}
