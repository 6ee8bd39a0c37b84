"""Tests of the GPU kernels of matrix states, interpreted, against the float32 specification."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix import gpu
from dense_jax.ops.matrix.gpu import Source, matrix_finish
from dense_jax.ops.matrix.reference import matrix_read, matrix_states
from tests.builders import fast_jit, normal
from tests.helpers import assert_trees_close
from tests.ops.sequences import strong_decays

B = 2


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
  """Makes chunks of a few tokens have several tiles."""
  monkeypatch.setattr(gpu, "TILE", 16)


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of the inputs.

  `gates` is, for each source, the index of its gate or None. `tail` names the epilogue's parts:
  "skip" of the values, "x" (skip of another array), "z", "moments".
  """

  time: int
  gates: tuple[int | None, ...] = (None,)
  tail: tuple[str, ...] = ()
  heads: int = 4
  groups: int = 2
  state_size: int = 3
  channels: int = 8
  decay_rows: int = B
  resets: bool = True
  scale: bool = False
  initial: bool = True
  chunk: int = 16
  # The log decay is about -strong in a fifth of the tokens; 0 means no such tokens.
  strong: float = 0.0


QUICK = [
    Case(37, scale=True, tail=("skip", "z", "moments"), chunk=32),
    Case(18, gates=(None, 0, 0), heads=2, groups=1, channels=48, decay_rows=1, tail=("moments",)),
]
SLOW = [
    *(Case(time, tail=("x", "z"), scale=True, chunk=32) for time in (1, 2, 15, 16, 17, 33, 257)),
    Case(37),
    Case(33, gates=(0, 1), tail=("skip",), scale=True, initial=False),
    Case(70, gates=(None, 0, 1), tail=("skip", "x", "z", "moments"), scale=True, chunk=64),
    Case(63, tail=("z",), resets=False, initial=False),
    *(Case(17, groups=groups, gates=(None, 0), tail=("moments",)) for groups in (1, 4)),
    *(Case(17, heads=6, groups=groups, state_size=48) for groups in (1, 2)),
    Case(257, gates=(None, 0, 0), tail=("skip", "z", "moments"), scale=True, chunk=0),
    *(Case(257, resets=resets, chunk=0, strong=strong, tail=("z",))
      for strong in (5.0, 200.0) for resets in (False, True)),
    Case(63, decay_rows=1, strong=20.0, chunk=48),
    Case(97, chunk=64, strong=60.0),
    Case(17, gates=(0,), heads=1, groups=1, channels=3),
    Case(40, heads=2, groups=2, state_size=160, channels=96, tail=("moments", "z"), resets=False),
]


def _inputs(case):
  """Makes (inputs, resets, cotangents); documents begin inside chunks and at their borders."""
  wide = B, case.time, case.heads, case.channels
  flat = B, case.time, case.heads * case.channels
  keys = B, case.time, case.groups, case.state_size

  def log_decay(seed):
    shape = case.decay_rows, case.time, case.heads
    if case.strong:
      return strong_decays(case.strong, *shape, share=0.2)
    return -jnp.exp(normal(seed, *shape) - 1)

  sources = [
      Source(
          normal(10 * i, *keys), normal(10 * i + 1, *keys), normal(10 * i + 2, *flat),
          jnp.exp(normal(10 * i + 6, *wide[:3])) if case.scale else None, log_decay(10 * i + 3),
          normal(10 * i + 5, B, *wide[2:], case.state_size) if case.initial else None, gate,
      )
      for i, gate in enumerate(case.gates)
  ]
  count = len({gate for gate in case.gates if gate is not None})
  gates = [normal(70 + index, *flat) for index in range(count)]
  epilogue = Epilogue(
      normal(80, case.heads) if "skip" in case.tail or "x" in case.tail else None,
      normal(81, *flat) if "x" in case.tail else None,
      normal(82, *flat) if "z" in case.tail else None, moments="moments" in case.tail,
  )
  resets = None
  if case.resets:
    begins = [[0, 3, 4, 16, 47], [15, 20, 32, 48, 100, 240]]
    resets = np.zeros((B, case.time), bool)
    for row, positions in enumerate(begins):
      resets[row, [position for position in positions if position < case.time]] = True
    resets = jnp.asarray(resets)
  moments = normal(92, B, case.time, case.heads, 2) if "moments" in case.tail else None
  final = normal(91, B, *wide[2:], case.state_size)
  return (sources, gates, epilogue), resets, (normal(90, *flat), moments, final)


def _specification(inputs, resets):
  sources, gates, epilogue = inputs
  y, finals = 0.0, []
  for source in sources:
    v = source.v_BTE.reshape(*source.v_BTE.shape[:2], source.log_decay_BTH.shape[2], -1)
    log_decay, initial = jnp.broadcast_to(source.log_decay_BTH, v.shape[:3]), source.initial_BHPN
    if source.scale_BTH is not None:
      v = v * source.scale_BTH[..., None]
    if initial is None:
      initial = jnp.zeros((B, *v.shape[2:], source.k_BTJN.shape[-1]))
    states, final = matrix_states(source.k_BTJN, v, log_decay, resets, initial)
    read = jax.vmap(matrix_read, in_axes=1, out_axes=1)(states, source.q_BTJN)
    y += read if source.gate is None else read * gates[source.gate].reshape(read.shape)
    finals.append(final)
  if epilogue.skip is not None and epilogue.x is None:
    epilogue = dataclasses.replace(epilogue, x=sources[0].v_BTE)
  output = dataclasses.replace(epilogue, dtype=jnp.dtype("float32"))(y)
  return output.y.reshape(sources[0].v_BTE.shape), output.moments, finals[0]


def _kernels(case):
  def run(inputs, resets):
    sources, gates, epilogue = inputs
    output, final = matrix_finish(
        sources, gates, resets, epilogue, chunk=case.chunk, interpret=True
    )
    return output.y, output.moments, final

  return run


def _everything(function, inputs, resets, cotangents):
  """Returns (outputs, gradients of every float input)."""

  @fast_jit
  def run(inputs, cotangents):
    outputs, vjp = jax.vjp(lambda inputs: function(inputs, resets), inputs)
    cotangents = jax.tree.map(lambda x, y: x.astype(y.dtype), cotangents, outputs)
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
  actual = _everything(_kernels(case), *inputs)
  _assert_close(actual, expected)


@pytest.mark.slow
def test_bfloat16_inputs_keep_float32_states():
  case = Case(63, gates=(None, 0), tail=("skip", "z", "moments"), scale=True, state_size=16)
  inputs, resets, cotangents = _inputs(case)
  sources, gates, epilogue = inputs
  names = ("q_BTJN", "k_BTJN", "v_BTE")

  def lowered(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

  low = (
      [
          dataclasses.replace(source, **{name: lowered(getattr(source, name)) for name in names})
          for source in sources
      ],
      lowered(gates),
      dataclasses.replace(epilogue, z=lowered(epilogue.z), dtype=jnp.dtype("bfloat16")),
  )
  actual = _everything(_kernels(case), low, resets, cotangents)
  # From the same rounded inputs.
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
  expected = _everything(_specification, rounded, resets, cotangents)
  assert [x.dtype for x in actual[0]] == [jnp.bfloat16, jnp.float32, jnp.float32]
  assert [x.dtype for x in jax.tree.leaves(actual[1])] == [x.dtype for x in jax.tree.leaves(low)]
  _assert_close(actual, expected, "bfloat16")


@pytest.mark.slow
def test_extreme_decays_stay_finite():
  case = Case(17, gates=(0,), tail=("z",))
  (sources, gates, epilogue), resets, cotangents = _inputs(case)
  cycle = jnp.asarray([-50.0, -1e-6, -1e4, -1e-30, -1e30])
  shape = sources[0].log_decay_BTH.shape
  for decay in (jnp.resize(cycle, shape), jnp.full(shape, -50.0), jnp.full(shape, -1e-6)):
    extreme = [dataclasses.replace(sources[0], log_decay_BTH=decay)], gates, epilogue
    for leaf in jax.tree.leaves(_everything(_kernels(case), extreme, resets, cotangents)):
      assert np.isfinite(leaf).all()
