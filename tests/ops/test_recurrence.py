"""Tests of recurrences: reads, gated reads of others, final states, memory of compiled programs."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from dense_jax.ops import resolver
from dense_jax.ops.diagonal.reference import diagonal_read
from dense_jax.ops.diagonal.token import DiagonalToken
from dense_jax.ops.lti.token import LtiToken
from dense_jax.ops.matrix.reference import matrix_read
from dense_jax.ops.matrix.token import MatrixToken
from dense_jax.ops.recurrence import Read
from tests.builders import fast_jit, normal, packed
from tests.helpers import assert_trees_close

B, T, C = 2, 13, 5
H, P, N, E = 2, 3, 4, 6
SEGMENTS = packed([[4, 9], [6, 4]], time=T, first=[2, 0])
FORMS = [
    ("diagonal", "associative"), ("diagonal", "recurrent"),
    ("matrix", "chunked"), pytest.param("matrix", "associative", marks=pytest.mark.slow),
    ("matrix", "recurrent"),
    *(pytest.param(*kernel, marks=pytest.mark.slow)
      for kernel in (("diagonal", "pallas"), ("matrix", "pallas"), ("matrix", "triton"))),
]


def _diagonal(implementation, time=T, segments=SEGMENTS, chunk=C, seed=0):
  """Makes a sequence of diagonal states, its own query, and another query."""
  form = resolver.diagonal_form(implementation, chunk)
  states = form(
      jax.nn.softplus(normal(seed, B, time, E)), -jnp.exp(normal(seed + 1, N, E)),
      normal(seed + 2, B, time, E), normal(seed + 3, B, time, N), segments,
      normal(seed + 5, B, N, E),
  )
  return states, normal(seed + 4, B, time, N), normal(seed + 8, B, time, N)


def _matrix(implementation, time=T, segments=SEGMENTS, chunk=C, seed=0):
  form = resolver.matrix_form(implementation, chunk)
  states = form(
      normal(seed, B, time, H, N), normal(seed + 1, B, time, H, P),
      jax.nn.softplus(normal(seed + 6, B, time, H)), -jnp.exp(normal(seed + 2, B, time, H)),
      segments, normal(seed + 3, B, H, P, N),
  )
  return states, normal(seed + 4, B, time, H, N), normal(seed + 8, B, time, H, N)


def _sequence(form, implementation, **options):
  build = {"diagonal": _diagonal, "matrix": _matrix}[form]
  return fast_jit(lambda: build(implementation, **options))()


def _read(form, states_BT, query_BT):
  """Computes equation (2) from materialized states, at every token."""
  rule = {"diagonal": "bten,btn->bte", "matrix": "bthpn,bthn->bthp"}[form]
  return jnp.einsum(rule, states_BT, query_BT)


def _valid(y):
  """Sets a read to zero in the padding, where it is undefined."""
  return y * SEGMENTS.valid_BT[(...,) + (None,) * (y.ndim - 2)]


@pytest.mark.parametrize(("form", "implementation"), FORMS)
def test_a_read_is_the_read_of_the_materialized_states(form, implementation):
  states, own, other = _sequence(form, implementation)
  materialized = states.materialize()
  for query in (own, other):
    actual = fast_jit(lambda states, query: states.read(query))(states, query)
    assert actual.dtype == jnp.float32
    assert_trees_close(_valid(actual), _valid(_read(form, materialized, query)))
  own_read, _ = fast_jit(lambda states, query: states.run(query))(states, own)
  assert own_read.dtype == jnp.float32
  assert_trees_close(_valid(own_read), _valid(_read(form, materialized, own)))


@pytest.mark.parametrize(("form", "implementation"), FORMS)
def test_run_adds_gated_reads_of_others(form, implementation):
  """Reads with and without a gate, of mapped states, and of another implementation's states."""
  states, own, other = _sequence(form, implementation)
  alike, _, _ = _sequence(form, implementation, seed=20)
  unlike, _, _ = _sequence(form, "recurrent", seed=40)
  channels = normal(60, *_read(form, states.materialize(), own).shape)
  flat = channels.reshape(B, T, -1)  # A gate of channels has one axis for heads and their channels.
  gates = normal(61, B, T, N)

  def double(h, gate_BN):
    return 2 * h * gate_BN.reshape(gate_BN.shape[0], *(1,) * (h.ndim - 2), N)

  doubled = jax.tree_util.Partial(double)
  expected = _read(form, states.materialize(), own)
  expected += channels * _read(form, alike.materialize(), other)
  cases = [
      ([Read(alike, other, flat)], expected),
      ([Read(alike, other, flat), Read(unlike, own)],
       expected + _read(form, unlike.materialize(), own)),
      ([Read(alike, other, flat), Read(alike, own, flat, gates, doubled)],
       expected + channels * _read(
           form, jax.vmap(double, 1, 1)(alike.materialize(), gates), own)),
  ]
  final = fast_jit(lambda states: states.run(own)[1])(states)
  for reads, right in cases:
    for recompute in (False, True):
      some = [dataclasses.replace(read, recompute=recompute) for read in reads]
      y, after = fast_jit(lambda states, some: states.run(own, some))(states, some)
      assert_trees_close(_valid(y), _valid(right))
      assert_trees_close(after, final)


def test_a_read_is_rounded_before_its_gate():
  states, _, other = _sequence("matrix", "chunked")
  gate = normal(60, B, T, H * P)
  read = Read(states, other, gate, dtype=jnp.dtype("bfloat16"))
  rounded = states.read(other).astype(jnp.bfloat16).astype(jnp.float32)
  assert read.value().dtype == jnp.float32
  assert_trees_close(read.value(), gate.reshape(rounded.shape) * rounded)


@pytest.mark.parametrize(("form", "implementation"), FORMS)
def test_a_mapped_read_is_the_read_of_the_mapped_states(form, implementation):
  states, query, _ = _sequence(form, implementation)
  gate_BTN = normal(9, B, T, N)

  def function(h, gate_BN):
    return jnp.tanh(h) * gate_BN.reshape(gate_BN.shape[0], *(1,) * (h.ndim - 2), N)

  actual = fast_jit(lambda states: states.read_mapped(query, function, gate_BTN))(states)
  expected = _read(form, jax.vmap(function, 1, 1)(states.materialize(), gate_BTN), query)
  assert_trees_close(_valid(actual), _valid(expected))


@pytest.mark.parametrize(("form", "implementation"), FORMS)
def test_the_final_state_is_that_after_the_last_valid_token(form, implementation):
  states, own, _ = _sequence(form, implementation)
  materialized = states.materialize()
  _, final = fast_jit(lambda states: states.run(own))(states)
  assert final.dtype == jnp.float32
  expected = jnp.stack([materialized[0, 12], materialized[1, 9]])
  by_channel = jnp.swapaxes(final, 1, 2) if form == "diagonal" else final
  assert_trees_close(by_channel, expected)
  assert_trees_close(materialized[1, -1], expected[1])  # Padding leaves it unchanged.


@pytest.mark.parametrize(("form", "implementation"), [FORMS[1], FORMS[2]])
def test_it_passes_through_jit_scan_and_checkpoint(form, implementation):
  states, _, query = _sequence(form, implementation)
  same = jax.tree.unflatten(jax.tree.structure(states), jax.tree.leaves(states))
  assert type(same) is type(states)

  @fast_jit
  def through(states, query):
    def body(carry, _):
      return carry, jax.checkpoint(lambda s, q: s.read(q), prevent_cse=False)(carry, query)

    carried, reads = jax.lax.scan(body, states, None, length=2)
    return carried, reads[1]

  carried, read = through(states, query)
  assert_trees_close(carried, states)
  assert_trees_close(read, states.read(query))


def _largest_array(compiled) -> int:
  """Returns the size of the largest array in the optimised program."""
  shapes = re.findall(r"\b(?:f32|f64|bf16|f16|pred|s32|u32)\[([\d,]+)\]", compiled.as_text())
  return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize(("form", "implementation"), FORMS[:4])
def test_the_gradient_of_a_read_never_holds_all_states(form, implementation):
  time, chunk = 96, 4
  segments = packed([[50, 46], [96]], time=time)
  states, _, query = _sequence(
      form, implementation, time=time, segments=segments, chunk=chunk
  )

  def gradient(read):
    def loss(states, query):
      return jnp.sum(read(states, query) ** 2)

    floats, structure = jax.tree.flatten(states)
    wanted = [leaf.dtype == jnp.float32 for leaf in floats]

    def of_floats(active, query):
      rest = iter(active)
      leaves = [next(rest) if w else leaf for w, leaf in zip(wanted, floats, strict=True)]
      return loss(structure.unflatten(leaves), query)

    active = [leaf for w, leaf in zip(wanted, floats, strict=True) if w]
    return fast_jit(jax.grad(of_floats, argnums=(0, 1))).lower(active, query).compile()

  all_states = math.prod({"diagonal": (B, time, N, E), "matrix": (B, time, H, P, N)}[form])
  lazy = gradient(lambda states, query: states.read(query))
  stored = gradient(lambda states, query: _read(form, states.materialize(), query))
  assert _largest_array(lazy) < all_states
  assert _largest_array(stored) >= all_states  # The check does find such an array.


def test_one_token_states_read_and_carry_on():
  h_BNE, h_BHPN = normal(0, B, N, E), normal(1, B, H, P, N)
  c_BN, q_BHN, c_EN = normal(2, B, N), normal(3, B, H, N), normal(4, E, N)
  for state, h, query, rule in (
      (DiagonalToken(h_BNE), h_BNE, c_BN, "bne,bn->be"),
      (MatrixToken(h_BHPN), h_BHPN, q_BHN, "bhpn,bhn->bhp"),
      (LtiToken(h_BNE), h_BNE, c_EN, "bne,en->be"),
  ):
    expected = jnp.einsum(rule, h, query)
    assert_trees_close(state.read(query), expected)
    y, final = state.run(query, [Read(state, query, 2 * jnp.ones_like(expected))])
    assert final is h
    assert_trees_close(y, 3 * expected)
    by_channel = state.materialize()  # N last
    assert_trees_close(by_channel, jnp.swapaxes(h, 1, 2) if h is h_BNE else h)
    assert_trees_close(state.read_mapped(query, lambda h, _: 2 * h, None) / 2, expected)
    assert_trees_close(state.plus(by_channel).run(query)[1], 2 * h)
    assert_trees_close(jax.jit(lambda state: state)(state), state)
  assert_trees_close(DiagonalToken(h_BNE).read(c_BN), diagonal_read(h_BNE, c_BN))
  assert_trees_close(MatrixToken(h_BHPN).read(q_BHN), matrix_read(h_BHPN, q_BHN))
