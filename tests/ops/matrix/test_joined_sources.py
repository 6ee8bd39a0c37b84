"""Kernels read the sum of several sources' states as one recurrence where it is one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dense_jax.ops import resolver
from dense_jax.ops.matrix.kernel_sequence import InterpretedGpuMatrix, InterpretedTpuMatrix
from dense_jax.ops.recurrence import Read
from tests.builders import fast_jit, normal, packed
from tests.helpers import assert_trees_close

B, T, H, P, N = 2, 21, 2, 8, 6
KERNELS = {"pallas": InterpretedTpuMatrix, "triton": InterpretedGpuMatrix}
Q, OTHER_Q = normal(0, B, T, H, N), normal(1, B, T, H, N)
GATE, OTHER_GATE = normal(2, B, T, H * P), normal(3, B, T, H * P)
# The query and the gate of each shallow source -> which of the layer's own and these join.
READS = {
    "all alike": (((Q, GATE), (Q, GATE), (Q, GATE)), (False, False, True, True)),
    "without a gate": (((Q, None), (Q, None)), (False, False, True)),
    "another query": (((Q, GATE), (OTHER_Q, GATE)), (False, False, False)),
    "another gate": (((Q, GATE), (Q, OTHER_GATE)), (False, False, False)),
    "two pairs": (((Q, GATE),) * 2 + ((Q, OTHER_GATE),) * 2, (False, False, True, False, True)),
}
QUICK = ("pallas", "two pairs")


def _run(implementation, asked, equal_decays=True):
  """Returns the sum of reads, the last state, and their gradients by all inputs."""
  form = resolver.matrix_form(implementation, 4, equal_decays=equal_decays)
  segments = packed([[9, 12], [5, 10]], time=T, first=[2, 0])
  decay_BTH = jnp.broadcast_to(jnp.asarray([-0.05, -0.4]), (1, T, H))

  def outputs(inputs):
    own, *sources = (form(k, v, None, decay_BTH, segments, initial) for k, v, initial in inputs)
    reads = [Read(source, *read) for source, read in zip(sources, asked, strict=True)]
    return own.run(OTHER_Q, reads)

  @fast_jit
  def run(inputs):
    found, vjp = jax.vjp(outputs, inputs)
    return found, vjp((normal(4, B, T, H, P), normal(5, B, H, P, N)))[0]

  return run([
      (normal(10 * i, B, T, H, N), normal(10 * i + 1, B, T, H * P), normal(10 * i + 2, B, H, P, N))
      for i in range(1, 2 + len(asked))
  ])


@pytest.fixture
def joins(monkeypatch):
  """What the kernels were given: whether each source joins the one before."""
  seen = []
  for kind in KERNELS.values():
    def kernel(sources, *rest, _kernel=kind.kernel, **options):
      seen.append(tuple(source.joins for source in sources))
      return _kernel(sources, *rest, **options)

    monkeypatch.setattr(kind, "kernel", staticmethod(kernel))
  return seen


@pytest.mark.parametrize(("implementation", "asked"), [
    pytest.param(name, asked, marks=() if (name, asked) == QUICK else mark)
    for name, mark in zip(KERNELS, (pytest.mark.exhaustive, pytest.mark.slow), strict=True)
    for asked in READS
])
def test_sources_with_one_query_and_gate_are_read_as_one(implementation, asked, joins):
  reads, expected = READS[asked]
  found = _run(implementation, reads)
  assert set(joins) == {expected}
  assert_trees_close(found, _run("recurrent", reads))


def test_decays_that_differ_from_layer_to_layer_keep_sources_apart(joins):
  reads, _ = READS["without a gate"]
  _run("pallas", reads, equal_decays=False)
  assert set(joins) == {(False, False, False)}


def test_a_source_that_joins_has_no_state_of_its_own():
  form = resolver.matrix_form("pallas", 4, equal_decays=True)
  states = form(
      normal(0, B, T, H, N), normal(1, B, T, H * P), None, jnp.zeros((1, T, H)),
      packed([[T], [T]], time=T), normal(2, B, H, P, N),
  )
  source = dataclasses.replace(states._asked(Q, None), joins=True)
  with pytest.raises(AssertionError):
    source.check(source)
