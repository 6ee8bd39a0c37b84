"""Tests of the TPU kernels of matrix states, interpreted, against the float32 specification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops import resolver
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matmul import matmul
from dense_jax.ops.matrix import tpu_plan
from dense_jax.ops.matrix.reference import matrix_read, matrix_states
from dense_jax.ops.matrix.tpu import matrix_reads
from dense_jax.ops.matrix.tpu_arrays import Matrix
from dense_jax.ops.recurrence import LowRankGate, Read, gate_value, gated
from tests.builders import fast_jit, normal
from tests.helpers import assert_trees_close
from tests.ops.sequences import one_document, strong_decays

B, P = 2, 8
CHUNK = 4  # Rounded up to 16.


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of the inputs; `gates` is true for each source with a gate, "low rank" for such a gate.

  `epilogue` names its parts: "skip" of the sources' values, or "x" for a skip of another array,
  "z" and "moments".
  """

  time: int
  gates: tuple[bool | str, ...] = (False, True)
  heads: int = 4
  groups: int = 2
  state_size: int = 3
  channels: int = P
  decay_rows: int = B
  resets: bool = True
  scale: bool = False
  initial: bool = True
  epilogue: str = ""
  chunk: int = CHUNK
  # The log decay is about -strong in a fifth of the tokens; 0 means no such tokens.
  strong: float = 0.0


QUICK = [
    Case(63, scale=True, epilogue="skip z moments"),
    Case(17, gates=(False, "low rank", True), heads=2, groups=1, state_size=16, decay_rows=1,
         initial=False, epilogue="moments"),
    Case(16, gates=(True,), groups=4, resets=False, epilogue="x z"),
    Case(97, gates=(False,), chunk=64, strong=60.0),
]
SLOW = [
    *(Case(33, scale=scale, epilogue=epilogue, groups=1, state_size=16, resets=False)
      for scale, epilogue in ((True, ""), (False, "skip moments"), (True, "x"), (False, "z"))),
    Case(33, gates=(False, "low rank", "low rank"), scale=True, epilogue="skip z moments",
         initial=False),
    *(Case(time) for time in (1, 2, 15, 16, 17, 257)),
    *(Case(time, resets=False) for time in (17, 63, 257)),
    *(Case(17, groups=groups, gates=(True,)) for groups in (1, 4)),
    *(Case(17, heads=6, groups=groups, state_size=16, gates=(False,)) for groups in (1, 2)),
    *(Case(17, gates=gates) for gates in ((False, False, False), (True, True, True))),
    Case(63, gates=(False,), decay_rows=1, resets=False),
    Case(63, gates=(True, False), decay_rows=1),
    Case(257, gates=(False, True, True), heads=2, groups=1, state_size=16, chunk=0),
    *(Case(257, resets=resets, chunk=0, strong=strong)
      for strong in (5.0, 200.0) for resets in (False, True)),
    Case(63, decay_rows=1, strong=20.0),
    Case(257, gates=(False,), chunk=50),
    Case(17, gates=(True,), heads=1, groups=1, channels=3),
    Case(17, scale=True, epilogue="x z moments", heads=1, groups=1, channels=3),
]


def _inputs(case):
  """Makes ((sources, epilogue), resets, cotangents).

  Documents begin inside chunks and at their borders.
  """
  by_head = B, case.time, case.heads
  shape = B, case.time, case.heads * case.channels
  keys = B, case.time, case.groups, case.state_size
  states = B, case.heads, case.channels, case.state_size

  def log_decay(seed):
    shape = case.decay_rows, case.time, case.heads
    if case.strong:
      return strong_decays(case.strong, *shape, share=0.2)
    return -jnp.exp(normal(seed, *shape) - 1)

  def gate_of(source, kind):
    if kind != "low rank":
      return normal(10 * source + 4, *shape) if kind else None
    hidden = normal(10 * source + 7, B, case.time, 5)
    return LowRankGate(hidden, normal(10 * source + 8, 5, shape[2]), matmul)

  sources = [
      Matrix(
          normal(10 * i, *keys), normal(10 * i + 1, *keys), normal(10 * i + 2, *shape),
          jax.nn.softplus(normal(10 * i + 6, *by_head)) if case.scale else None,
          log_decay(10 * i + 3),
          gate_of(i, gate),
          normal(10 * i + 5, *states) if case.initial else None,
      )
      for i, gate in enumerate(case.gates)
  ]
  parts = case.epilogue.split()
  epilogue = Epilogue(
      normal(80, case.heads) if {"skip", "x"} & set(parts) else None,
      normal(81, *shape) if "x" in parts else None,
      normal(82, *shape) if "z" in parts else None, moments="moments" in parts,
  )
  resets = None
  if case.resets:
    begins = [[0, 3, 4, 16, 47], [15, 20, 32, 48, 100, 240]]
    resets = np.zeros((B, case.time), bool)
    for row, positions in enumerate(begins):
      resets[row, [position for position in positions if position < case.time]] = True
    resets = jnp.asarray(resets)
  moments = normal(92, *by_head, 2) if epilogue.moments else None
  return (sources, epilogue), resets, (normal(90, *shape), moments, normal(91, *states))


def _specification(sources, epilogue, resets):
  heads = sources[0].log_decay_BTH.shape[2]
  by_head = (*sources[0].v_BTE.shape[:2], heads, -1)
  y, finals = 0.0, []
  for source in sources:
    log_decay = jnp.broadcast_to(source.log_decay_BTH, by_head[:3])
    v_BTHP, initial = source.v_BTE.reshape(by_head), source.initial_BHPN
    if source.scale_BTH is not None:
      v_BTHP = source.scale_BTH[..., None] * v_BTHP
    if initial is None:
      initial = jnp.zeros((B, heads, v_BTHP.shape[3], source.k_BTJN.shape[3]))
    states, final = matrix_states(source.k_BTJN, v_BTHP, log_decay, resets, initial)
    read = jax.vmap(matrix_read, in_axes=1, out_axes=1)(states, source.q_BTJN)
    y += gated(gate_value(source.gate), read)
    finals.append(final)
  if epilogue.skip is not None and epilogue.x is None:
    epilogue = dataclasses.replace(epilogue, x=sources[0].v_BTE)
  output = epilogue(y)
  return output.y.reshape(*by_head[:2], -1), output.moments, finals[0]


def _kernel(chunk):
  def run(sources, epilogue, resets):
    output, final = matrix_reads(sources, resets, epilogue, chunk=chunk, interpret=True)
    return output.y, output.moments, final

  return run


def _everything(function, inputs, resets, cotangents):
  """Returns ((y, moments, final state), gradients of every input of sources and epilogue)."""

  @fast_jit
  def run(inputs, cotangents):
    outputs, vjp = jax.vjp(lambda inputs: function(*inputs, resets), inputs)
    return outputs, vjp(cotangents)[0]

  return run(inputs, cotangents)


def _assert_close(actual, expected, dtype="float32"):
  """Compares each leaf relative to its size, as gradients are sums over T, P or N."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  leaves = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
  for (path, leaf), expected_leaf in leaves:
    size = max(1.0, float(jnp.std(expected_leaf)))
    name = jax.tree_util.keystr(path)
    assert_trees_close({name: leaf}, {name: expected_leaf}, dtype, scale=size)


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_outputs_final_state_and_gradients_are_the_references(case):
  inputs = _inputs(case)
  expected = _everything(_specification, *inputs)
  actual = _everything(_kernel(case.chunk), *inputs)
  _assert_close(actual, expected)


def test_without_a_gradient_the_outputs_are_the_same():
  inputs, resets, _ = _inputs(Case(33, gates=(True,)))
  outputs = [fast_jit(run)(*inputs, resets) for run in (_kernel(CHUNK), _specification)]
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
  case = Case(
      17, gates=("low rank",), heads=heads, groups=groups, channels=channels, scale=True,
      epilogue="skip z moments",
  )
  inputs = _inputs(case)
  expected = _everything(_specification, *inputs)
  _assert_close(_everything(_kernel(CHUNK), *inputs), expected)


@pytest.mark.slow
def test_bfloat16_inputs_keep_float32_states():
  (sources, epilogue), resets, cotangents = _inputs(
      Case(63, state_size=16, scale=True, epilogue="skip z moments")
  )

  def lowered(tree, *names):
    low = {name: getattr(tree, name) for name in names}
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), low)
    return dataclasses.replace(tree, **low)

  low = (
      [lowered(source, "q_BTJN", "k_BTJN", "v_BTE", "gate") for source in sources],
      lowered(epilogue, "z"),
  )
  actual = _everything(_kernel(CHUNK), low, resets, cotangents)
  # From the same rounded inputs.
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
  expected = _everything(_specification, rounded, resets, cotangents)
  assert [x.dtype for x in jax.tree.leaves(actual[0])] == [jnp.float32] * 3
  assert [x.dtype for x in jax.tree.leaves(actual[1])] == [x.dtype for x in jax.tree.leaves(low)]
  _assert_close(actual, expected, "bfloat16")


@pytest.mark.slow
def test_extreme_decays_stay_finite():
  (sources, epilogue), resets, cotangents = _inputs(Case(17, gates=(True,)))
  cycle = jnp.asarray([-50.0, -1e-6, -1e4, -1e-30, -1e30])
  shape = sources[0].log_decay_BTH.shape
  for decay in (jnp.resize(cycle, shape), jnp.full(shape, -50.0), jnp.full(shape, -1e-6)):
    extreme = [dataclasses.replace(sources[0], log_decay_BTH=decay)], epilogue
    for leaf in jax.tree.leaves(_everything(_kernel(CHUNK), extreme, resets, cotangents)):
      assert np.isfinite(leaf).all()
