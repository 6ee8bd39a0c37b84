"""Cases of the kernels of matrix states, and what the float32 specification computes in them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matmul import matmul
from dense_jax.ops.matrix.kernel_inputs import Source
from dense_jax.ops.matrix.reference import matrix_read, matrix_states
from dense_jax.ops.recurrence import LowRankGate, gate_value, gated
from tests.builders import fast_jit, normal
from tests.helpers import assert_trees_close
from tests.ops.sequences import strong_decays

B = 2


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of the inputs.

  `gates` is, for each source, the index of its gate or None; those in `low_rank` are such gates.
  `joins` are the sources that join the one before.
  `tail` names the epilogue's parts: "skip" of the values, "x" (skip of another array), "z",
  "moments".
  """

  time: int
  gates: tuple[int | None, ...] = (None,)
  low_rank: tuple[int, ...] = ()
  joins: tuple[int, ...] = ()
  tail: tuple[str, ...] = ()
  heads: int = 4
  groups: int = 2
  state_size: int = 3
  channels: int = 8
  decay_rows: int = B
  resets: bool = True
  scale: bool = False
  initial: bool = True
  rank: int = 5
  chunk: int = 16
  # The log decay is about -strong in a fifth of the tokens; 0 means no such tokens.
  strong: float = 0.0


def marked(quick, slow, exhaustive):
  """Returns all cases as a test's parameters, with the marks of those that are not quick."""
  return [
      *quick, *(pytest.param(case, marks=pytest.mark.slow) for case in slow),
      *(pytest.param(case, marks=pytest.mark.exhaustive) for case in exhaustive),
  ]


def make_inputs(case):
  """Makes ((sources, gates, epilogue), resets, cotangents).

  Documents begin inside chunks and at their borders.
  """
  by_head = B, case.time, case.heads
  flat = B, case.time, case.heads * case.channels
  keys = B, case.time, case.groups, case.state_size
  states = B, case.heads, case.channels, case.state_size

  def log_decay(seed):
    shape = case.decay_rows, case.time, case.heads
    if case.strong:
      return strong_decays(case.strong, *shape, share=0.2)
    return -jnp.exp(normal(seed, *shape) - 1)

  def gate(index):
    if index not in case.low_rank:
      return normal(70 + index, *flat)
    return LowRankGate(
        normal(73 + index, B, case.time, case.rank), normal(76 + index, case.rank, flat[2]), matmul
    )

  sources = [
      Source(
          normal(10 * i, *keys), normal(10 * i + 1, *keys), normal(10 * i + 2, *flat),
          jnp.exp(normal(10 * i + 6, *by_head)) if case.scale else None,
          log_decay(10 * i + 3),
          normal(10 * i + 5, *states) if case.initial and i not in case.joins else None, index,
          i in case.joins,
      )
      for i, index in enumerate(case.gates)
  ]
  gates = [gate(index) for index in range(len({i for i in case.gates if i is not None}))]
  epilogue = Epilogue(
      normal(80, case.heads) if {"skip", "x"} & set(case.tail) else None,
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
  moments = normal(92, *by_head, 2) if epilogue.moments else None
  return (sources, gates, epilogue), resets, (normal(90, *flat), moments, normal(91, *states))


def specification(sources, gates, epilogue, resets):
  """Returns the result, its moments, and the first source's last state."""
  by_head = (*sources[0].v_BTE.shape[:2], sources[0].log_decay_BTH.shape[2], -1)
  y, finals = 0.0, []
  for source in sources:
    log_decay = jnp.broadcast_to(source.log_decay_BTH, by_head[:3])
    v_BTHP, initial = source.v_BTE.reshape(by_head), source.initial_BHPN
    if source.scale_BTH is not None:
      v_BTHP = source.scale_BTH[..., None] * v_BTHP
    if initial is None:
      initial = jnp.zeros((B, *v_BTHP.shape[2:], source.k_BTJN.shape[3]))
    states, final = matrix_states(source.k_BTJN, v_BTHP, log_decay, resets, initial)
    read = jax.vmap(matrix_read, in_axes=1, out_axes=1)(states, source.q_BTJN)
    y += gated(None if source.gate is None else gate_value(gates[source.gate]), read)
    finals.append(final)
  if epilogue.skip is not None and epilogue.x is None:
    epilogue = dataclasses.replace(epilogue, x=sources[0].v_BTE)
  output = dataclasses.replace(epilogue, dtype=jnp.dtype("float32"))(y)
  return output.y.reshape(*by_head[:2], -1), output.moments, finals[0]


def tied(sources):
  """Gives sources that join the queries and decays of the one before."""
  tied_sources = []
  for source in sources:
    if source.joins:
      leader = tied_sources[-1]
      source = dataclasses.replace(
          source, q_BTJN=leader.q_BTJN, log_decay_BTH=leader.log_decay_BTH
      )
    tied_sources.append(source)
  return tied_sources


def kernels(finish, case):
  """Returns a platform's kernels as a function like `specification`."""

  def run(sources, gates, epilogue, resets):
    output, final = finish(sources, gates, resets, epilogue, chunk=case.chunk, interpret=True)
    return output.y, output.moments, final

  return run


def everything(function, inputs, resets, cotangents):
  """Returns ((y, moments, final state), gradients of every input)."""

  @fast_jit
  def run(inputs, cotangents):
    outputs, vjp = jax.vjp(
        lambda inputs: function(tied(inputs[0]), *inputs[1:], resets), inputs
    )
    cotangents = jax.tree.map(lambda x, y: x.astype(y.dtype), cotangents, outputs)
    return outputs, vjp(cotangents)[0]

  return run(inputs, cotangents)


def assert_close(actual, expected, dtype="float32"):
  """Compares each leaf relative to its size, as gradients are sums over T, P or N."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  leaves = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
  for (path, leaf), expected_leaf in leaves:
    size = max(1.0, float(jnp.std(expected_leaf)))
    name = jax.tree_util.keystr(path)
    assert_trees_close({name: leaf}, {name: expected_leaf}, dtype, scale=size)


def assert_like_the_specification(finish, case):
  """Compares outputs, the final state and all gradients of a case."""
  inputs = make_inputs(case)
  assert_close(everything(kernels(finish, case), *inputs), everything(specification, *inputs))


def assert_finite_with_extreme_decays(finish, case):
  """Runs decays that clear the state, and decays that hardly change it, in a case of one source."""
  (sources, gates, epilogue), resets, cotangents = make_inputs(case)
  cycle = jnp.asarray([-50.0, -1e-6, -1e4, -1e-30, -1e30])
  shape = sources[0].log_decay_BTH.shape
  for decay in (jnp.resize(cycle, shape), jnp.full(shape, -50.0), jnp.full(shape, -1e-6)):
    extreme = [dataclasses.replace(sources[0], log_decay_BTH=decay)], gates, epilogue
    for leaf in jax.tree.leaves(everything(kernels(finish, case), extreme, resets, cotangents)):
      assert np.isfinite(leaf).all()


def assert_float32_states_of_bfloat16_inputs(finish, case, dtype):
  """Compares a case with tokens in bfloat16, and a result of that dtype, with the specification."""
  (sources, gates, epilogue), resets, cotangents = make_inputs(case)

  def lowered(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

  names = ("q_BTJN", "k_BTJN", "v_BTE")
  low = (
      [
          dataclasses.replace(source, **{name: lowered(getattr(source, name)) for name in names})
          for source in sources
      ],
      lowered(gates), dataclasses.replace(epilogue, z=lowered(epilogue.z), dtype=jnp.dtype(dtype)),
  )
  actual = everything(kernels(finish, case), low, resets, cotangents)
  # From the same rounded inputs.
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
  expected = everything(specification, rounded, resets, cotangents)
  assert [x.dtype for x in actual[0]] == [dtype, jnp.float32, jnp.float32]
  assert [x.dtype for x in jax.tree.leaves(actual[1])] == [x.dtype for x in jax.tree.leaves(low)]
  assert_close(actual, expected, "bfloat16")


def assert_states_are_not_rounded(finish):
  """A state that nothing is added to, and its gradient, go through all chunks bit for bit."""
  case = Case(70)
  (sources, gates, epilogue), _, (d_y, _, d_final) = make_inputs(case)
  own, rounded = sources[0], jnp.bfloat16
  own = dataclasses.replace(
      own, q_BTJN=jnp.zeros_like(own.q_BTJN, rounded), k_BTJN=jnp.zeros_like(own.k_BTJN, rounded),
      v_BTE=own.v_BTE.astype(rounded), log_decay_BTH=jnp.zeros_like(own.log_decay_BTH),
  )
  (_, _, final), (gradients, *_) = everything(
      kernels(finish, case), ([own], gates, epilogue), None, (d_y, None, d_final)
  )
  np.testing.assert_array_equal(final, own.initial_BHPN)
  np.testing.assert_array_equal(gradients[0].initial_BHPN, d_final)
