"""StateSequence: lazy reads, final states, and what the compiled program holds."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from dense_jax.ops import reference
from dense_jax.ops.dispatch import INTERPRETED
from dense_jax.ops.states import scan_diagonal, scan_matrix
from dense_jax.ops.token_states import DiagonalState, MatrixState
from tests.builders import fast_jit, normal, packed
from tests.helpers import assert_trees_close

B, T, C = 2, 13, 5
H, P, N, E = 2, 3, 4, 6
SEGMENTS = packed([[4, 9], [6, 4]], time=T, first=[2, 0])
FORMS = [
    ("diagonal", "associative"), ("diagonal", "recurrent"),
    ("matrix", "chunked"), ("matrix", "associative"), ("matrix", "recurrent"),
    ("diagonal", INTERPRETED), ("matrix", INTERPRETED),
]


def _diagonal(implementation, time=T, segments=SEGMENTS, chunk=C):
  """A sequence of diagonal states, its own query's read, and another query."""
  own = normal(4, B, time, N)
  y, states = scan_diagonal(
      jax.nn.softplus(normal(0, B, time, E)), -jnp.exp(normal(1, N, E)), normal(2, B, time, E),
      normal(3, B, time, N), segments, normal(5, B, N, E),
      implementation=implementation, chunk=chunk,
  ).read_with(own)
  return states, own, y, normal(8, B, time, N)


def _matrix(implementation, time=T, segments=SEGMENTS, chunk=C):
  own = normal(4, B, time, H, N)
  y, states = scan_matrix(
      normal(0, B, time, H, N), normal(1, B, time, H, P), -jnp.exp(normal(2, B, time, H)),
      segments, normal(3, B, H, P, N), implementation=implementation, chunk=chunk,
  ).read_with(own)
  return states, own, y, normal(8, B, time, H, N)


def _sequence(form, implementation, **options):
  build = {"diagonal": _diagonal, "matrix": _matrix}[form]
  return fast_jit(lambda: build(implementation, **options))()


def _read(form, states_BT, query_BT):
  """Equation (2) at every token of materialized states."""
  rule = {"diagonal": "bten,btn->bte", "matrix": "bthpn,bthn->bthp"}[form]
  return jnp.einsum(rule, states_BT, query_BT)


@pytest.mark.parametrize(("form", "implementation"), FORMS)
def test_a_read_is_the_read_of_the_materialized_states(form, implementation):
  states, own, own_read, other = _sequence(form, implementation)
  valid = SEGMENTS.valid_BT[(...,) + (None,) * (own_read.ndim - 2)]
  materialized = states.materialize()
  for query in (own, other):
    actual = fast_jit(lambda states, query: states.read(query))(states, query)
    assert actual.dtype == jnp.float32
    assert_trees_close(actual * valid, _read(form, materialized, query) * valid)
  assert_trees_close(own_read * valid, _read(form, materialized, own) * valid)


@pytest.mark.parametrize(("form", "implementation"), FORMS)
def test_a_mapped_read_is_the_read_of_the_mapped_states(form, implementation):
  states, query, own_read, _ = _sequence(form, implementation)
  gate_BTN = normal(9, B, T, N)

  def function(h, gate_BN):
    return jnp.tanh(h) * gate_BN.reshape(gate_BN.shape[0], *(1,) * (h.ndim - 2), N)

  actual = fast_jit(lambda states: states.read_mapped(query, function, gate_BTN))(states)
  expected = _read(form, jax.vmap(function, 1, 1)(states.materialize(), gate_BTN), query)
  valid = SEGMENTS.valid_BT[(...,) + (None,) * (own_read.ndim - 2)]
  assert_trees_close(actual * valid, expected * valid)


@pytest.mark.parametrize(("form", "implementation"), FORMS)
def test_final_is_the_state_after_the_last_valid_token(form, implementation):
  states = _sequence(form, implementation)[0]
  materialized = states.materialize()
  assert states.final().dtype == jnp.float32
  expected = jnp.stack([materialized[0, 12], materialized[1, 9]])
  final = states.final()
  by_channel = jnp.swapaxes(final, 1, 2) if form == "diagonal" else final
  assert_trees_close(by_channel, expected)
  assert_trees_close(materialized[1, -1], expected[1])  # Padding leaves it as it is.


@pytest.mark.parametrize(("form", "implementation"), [FORMS[1], FORMS[2]])
def test_it_passes_through_jit_scan_and_checkpoint(form, implementation):
  states, _, _, query = _sequence(form, implementation)
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
  """Elements of the largest array that the optimised program names."""
  shapes = re.findall(r"\b(?:f32|f64|bf16|f16|pred|s32|u32)\[([\d,]+)\]", compiled.as_text())
  return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize(("form", "implementation"), FORMS[:4])
def test_the_gradient_of_a_read_never_holds_all_states(form, implementation):
  time, chunk = 96, 4
  segments = packed([[50, 46], [96]], time=time)
  states, _, _, query = _sequence(
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
  assert _largest_array(stored) >= all_states  # The check itself sees such an array.


def test_one_token_states_read_and_carry_on():
  h_BNE, h_BHPN = normal(0, B, N, E), normal(1, B, H, P, N)
  c_BN, q_BHN = normal(2, B, N), normal(3, B, H, N)
  for state, h, query, rule, read in (
      (DiagonalState(h_BNE), h_BNE, c_BN, "bne,bn->be", reference.diagonal_read),
      (MatrixState(h_BHPN), h_BHPN, q_BHN, "bhpn,bhn->bhp", reference.matrix_read),
  ):
    assert_trees_close(state.read(query), jnp.einsum(rule, h, query))
    assert_trees_close(state.read(query), read(h, query))
    assert state.final() is h
    by_channel = state.materialize()  # N last
    assert_trees_close(by_channel, jnp.swapaxes(h, 1, 2) if h is h_BNE else h)
    assert_trees_close(state.read_mapped(query, lambda h, _: 2 * h, None) / 2, read(h, query))
    assert_trees_close(state.plus(by_channel).final(), 2 * h)
    assert_trees_close(jax.jit(lambda state: state)(state), state)
