"""Dense hidden connections: equations (3) to (5) by hand, zero gates, few sources."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dense_jax.config import DenseConfig
from dense_jax.layers.dense import make_connection
from dense_jax.layers.dense.fusion import FUSIONS
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.ops import resolver
from dense_jax.ops.diagonal.token import DiagonalToken
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.token import MatrixToken
from tests.builders import (
    INPUT_FAMILIES,
    STATE_FAMILIES,
    each_family,
    fast_jit,
    model_config,
    normal,
    packed,
    random_model,
    random_params,
    random_tokens,
)
from tests.helpers import assert_trees_close

B, T, D = 2, 7, 16
E, N, H, P = 6, 3, 2, 3
SEGMENTS = packed([[3, 4], [5]], time=T, first=[2, 0])


def _connection(inject, sources, query=(N,), **options):
  """Makes a connection of depth 2 with random parameters; returns both."""
  config = model_config("mamba", **{"depth": 2, "inject": inject, "layers": 4} | options)
  module = make_connection(
      config, sources=sources, inputs={"b": (N, None), "x": (E, "inner")}, query=query,
      channels=E, form="diagonal", rngs=nnx.Rngs(0),
  )
  graph, state = nnx.split(module)
  state = jax.tree.map(lambda leaf: leaf + normal(leaf.size, *leaf.shape, scale=0.5), state)
  return nnx.merge(graph, state)


def _gate(gate, x):
  """Computes silu(silu(x W1) W2) by hand."""
  return jax.nn.silu(jax.nn.silu(x @ gate.down.kernel[...]) @ gate.up.kernel[...])


def _diagonal_states(seed):
  return resolver.diagonal_form("recurrent", 3)(
      jax.nn.softplus(normal(seed, B, T, E)), -jnp.exp(normal(seed + 1, N, E)),
      normal(seed + 2, B, T, E), normal(seed + 3, B, T, N), SEGMENTS,
      normal(seed + 4, B, N, E),
  )


def _matrix_states(seed):
  return resolver.matrix_form("chunked", 3)(
      normal(seed, B, T, H, N), normal(seed + 1, B, T, H, P), None,
      -jnp.exp(normal(seed + 2, B, T, H)), SEGMENTS, normal(seed + 3, B, H, P, N),
  )


STATES = _diagonal_states(0)


def _phi_by_hand(connection, x, h, index):
  """Computes g_E * g_N * project(h) of [..., channels, N] or matrix states [..., H, P, N]."""
  transition = connection.transition
  lead, matrix_form = x.shape[:-1], h.ndim == x.ndim + 2

  def gate(gates, *shape):
    return _gate(gates[min(index, len(gates) - 1)], x).reshape(*lead, *shape)

  if hasattr(transition, "linear"):
    w = transition.linear[...][index]
    h = jnp.einsum("hnm,...hpm->...hpn" if matrix_form else "nm,...em->...en", w, h)
  if hasattr(transition, "down"):
    h = h + jax.nn.silu(h @ transition.down[...][index]) @ transition.up[...][index]
  if hasattr(transition, "state_gates"):
    h = h * (1 + gate(transition.state_gates, *(1,) * (h.ndim - x.ndim), N))
  if hasattr(transition, "channel_gates"):
    h = h * gate(transition.channel_gates, *h.shape[len(lead) : -1], 1)
  return h


def _by_hand(connection, fusion, x, states, query):
  """Computes equations (3) and (4) on materialized states: y = C fuse(h, phi(h_1), ...)."""
  own, *sources = [state.materialize() for state in states]
  phis = [_phi_by_hand(connection, x, h, index) for index, h in enumerate(sources)]
  per_head = own.ndim == x.ndim + 2
  contract = "...hpn,...hn->...hp" if per_head else "...en,...n->...e"
  read = lambda h: jnp.einsum(contract, h, query)  # noqa: E731
  if fusion == "add":
    return read(own + sum(phis))
  if fusion == "concat":
    linear = connection.fusion.linear[...]
    rule = "hnm,...hpm->...hpn" if per_head else "nm,...em->...en"
    return read(sum(jnp.einsum(rule, w, h) for w, h in zip(linear, [own, *phis], strict=True)))
  if fusion == "gated":
    z = jnp.tanh(_gate(connection.fusion.gate, x)).reshape(*own.shape[:-1], 1)
    return read((1 - z) * own + z * sum(phis))
  asked = x @ connection.fusion.to_query.kernel[...]
  to_key = connection.fusion.to_key.kernel[...]
  keys = [read(h).reshape(*x.shape[:-1], E) @ to_key for h in (own, *phis)]
  scores = jnp.stack([jnp.sum(asked * key, axis=-1) for key in keys]) / asked.shape[-1] ** 0.5
  weights = jax.nn.softmax(scores, axis=0).reshape(-1, *x.shape[:-1], *(1,) * (1 + per_head), 1)
  if not per_head:
    weights = weights.reshape(-1, *x.shape[:-1], 1, 1)
  return read(own + sum(w * h for w, h in zip(weights[1:], phis, strict=True)))


OPTIONS = [
    {},
    {"transition": "linear", "gate_sharing": "per_source"},
    {"transition": "linear", "gate": "channel_state", "remat": "full"},
    {"transition": "mlp", "transition_rank": 2},
    {"transition": "mlp", "gate": "channel_state", "gate_sharing": "per_source"},
    {"gate": "none"},
    {"gate": "none", "transition": "linear", "fusion": "concat"},
    {"gate": "channel_state", "gate_sharing": "per_source", "fusion": "concat"},
    {"fusion": "gated"},
    {"fusion": "gated", "transition": "mlp", "gate": "none"},
    {"fusion": "attention"},
    {"fusion": "attention", "transition": "linear", "gate": "channel_state"},
]


@pytest.mark.parametrize("key", ["transition", "gate", "gate_sharing", "fusion"])
def test_the_options_have_every_choice(key):
  (field,) = [field for field in dataclasses.fields(DenseConfig) if field.name == key]
  choices = field.metadata["valid"].removeprefix("one of ").split(", ")
  assert {options.get(key, field.default) for options in OPTIONS} == set(choices)
  if key == "fusion":
    assert sorted(FUSIONS) == sorted(choices)


def _option_name(options):
  return "-".join(str(value) for value in options.values()) or "default"


@pytest.mark.parametrize(("form", "sources"), [
    ("diagonal", 1), ("matrix", 2), pytest.param("diagonal", 2, marks=pytest.mark.slow),
    pytest.param("matrix", 1, marks=pytest.mark.exhaustive),
])
@pytest.mark.parametrize("options", OPTIONS, ids=_option_name)
def test_state_injection_is_equations_3_and_4(form, options, sources):
  query_shape = {"diagonal": (N,), "matrix": (H, N)}[form]
  connection = _connection("state", sources, query_shape, **options)
  x_BTD, query = normal(90, B, T, D), normal(91, B, T, *query_shape)
  fusion = options.get("fusion", "add")

  @fast_jit
  def both(connection):
    make = {"diagonal": _diagonal_states, "matrix": _matrix_states}[form]
    states = [make(10 * index) for index in range(1 + sources)]
    expected = _by_hand(connection, fusion, x_BTD, states, query)
    sequence, _, shared = connection.run(x_BTD, query, states[0], states[1:], Epilogue())
    assert shared.materialize().shape == states[0].materialize().shape
    # One token of decoding is the same.
    token = {
        "diagonal": lambda h: DiagonalToken(jnp.swapaxes(h, 1, 2)), "matrix": MatrixToken,
    }[form]
    last = [token(state.materialize()[:, 2]) for state in states]
    one, _, _ = connection.run(x_BTD[:, 2], query[:, 2], last[0], last[1:], Epilogue())
    return sequence.y, one.y, expected

  sequence, one, expected = both(connection)
  valid = np.asarray(SEGMENTS.valid_BT)
  assert_trees_close(sequence[valid], expected[valid])
  assert_trees_close(one, expected[:, 2])


@pytest.mark.parametrize("options", [
    {}, {"transition": "linear"}, {"gate": "channel_state"},
    {"transition": "linear", "gate": "none"},
], ids=_option_name)
@pytest.mark.parametrize("form", ["diagonal", "matrix"])
def test_fused_states_are_a_chain_of_lazy_reads(form, options):
  """h'_1 = h_1 + phi_1(h_0), h'_2 = h_2 + phi_2(h'_1), and what layer 3 reads of h'_2."""
  query_shape = {"diagonal": (N,), "matrix": (H, N)}[form]
  connections = [_connection("state", 1, query_shape, source="fused", depth=1, **options)] * 3
  x_BTD, query = normal(90, B, T, D), normal(91, B, T, *query_shape)

  @fast_jit
  def both(connections):
    make = {"diagonal": _diagonal_states, "matrix": _matrix_states}[form]
    states = [make(10 * index) for index in range(4)]
    shared, h = states[0], states[0].materialize()
    for connection, own in zip(connections, states[1:], strict=True):
      output, _, shared = connection.run(x_BTD, query, own, [shared], Epilogue())
      h = own.materialize() + _phi_by_hand(connection, x_BTD, h, 0)
    # Decoding adds the states of one token instead.
    token = {
        "diagonal": lambda h: DiagonalToken(jnp.swapaxes(h, 1, 2)), "matrix": MatrixToken,
    }[form]
    one, first_x, first_q = token(states[0].materialize()[:, 2]), x_BTD[:, 2], query[:, 2]
    for connection, own in zip(connections, states[1:], strict=True):
      own = token(own.materialize()[:, 2])
      _, _, one = connection.run(first_x, first_q, own, [one], Epilogue())
    expected = jnp.einsum("bthpn,bthn->bthp" if form == "matrix" else "bten,btn->bte", h, query)
    mapped = shared.read_mapped(query, lambda h, _: 2 * h, None)
    reads = output.y, shared.read(query), mapped / 2
    return reads, shared.materialize(), one.materialize(), expected, h

  reads, materialized, one, expected, h = both(connections)
  valid = np.asarray(SEGMENTS.valid_BT)
  for read in reads:
    assert_trees_close(read[valid], expected[valid])
  assert_trees_close(materialized, h)
  assert_trees_close(one, h[:, 2])


@pytest.mark.parametrize("input_norm", [True, False])
@pytest.mark.parametrize("sources", [1, 2])
def test_input_injection_is_equation_5(sources, input_norm):
  connection = _connection("inputs", sources, input_norm=input_norm)
  x_BTD = normal(0, B, T, D)

  def inputs(seed):
    return {"b": normal(seed, B, T, N), "x": normal(seed + 1, B, T, E)}

  own, shallow = inputs(1), [inputs(10 * (index + 1)) for index in range(sources)]
  expected = {}
  for name in ("b", "x"):
    gate = _gate(connection.gates[name][0], x_BTD)
    total = own[name] + sum(gate * source[name] for source in shallow)
    if input_norm:
      mean_square = jnp.mean(total**2, axis=-1, keepdims=True)
      scale = connection.norms[name].scale[...][None, None]
      total = total / jnp.sqrt(mean_square + 1e-5) * scale
    expected[name] = total
  actual = connection.fuse_inputs(x_BTD, own, shallow)
  assert_trees_close(actual.fused, expected)
  for kept in (actual.own, actual.shared):
    assert all(kept[name] is own[name] for name in own)
  assert connection.share(actual, STATES) is actual.shared
  # The hook of the other kind of injection does nothing.
  read = connection.run(x_BTD, own["b"], STATES, shallow, Epilogue())[0].y
  assert_trees_close(read, STATES.read(own["b"]))


@pytest.mark.parametrize("inject", ["state", "inputs"])
def test_no_sources_is_the_identity_without_parameters(inject):
  connection = _connection(inject, 0)
  assert not jax.tree.leaves(nnx.state(connection))
  own = {"b": normal(0, B, T, N)}
  inputs = connection.fuse_inputs(normal(1, B, T, D), own, ())
  assert inputs.fused is own
  assert inputs.own is own
  assert connection.share(inputs, STATES) is (STATES if inject == "state" else own)
  read = connection.run(normal(1, B, T, D), own["b"], STATES, (), Epilogue())[0].y
  assert_trees_close(read, STATES.read(own["b"]))


@pytest.mark.parametrize(("family", "inject"), [
    *((family, "state") for family in STATE_FAMILIES),
    *((family, "inputs") for family in INPUT_FAMILIES),
])
def test_each_layer_has_one_gate_for_all_its_sources(family, inject):
  options = {"transition": "linear"} if inject == "state" else {}
  config = model_config(family, 2, inject, layers=4, **options)
  params = get_params(abstract_model(config))
  dense = sorted(name for name in params if ".dense." in name)
  inputs = {"mamba": "bx", "mamba2": "bx"}.get(family, "kv")
  if inject == "state":
    one = [f"transition.channel_gates.0.{part}.kernel" for part in ("down", "up")]
    one += ["transition.linear"]
  else:
    one = [f"gates.{name}.0.{part}.kernel" for name in inputs for part in ("down", "up")]
    one += [f"norms.{name}.scale" for name in inputs]
  # Layer 0 reads no other layer and so has no such parameters.
  layers = (1, 2, 3)
  assert dense == sorted(
      f"stack.prefix_layers.{layer}.mixer.dense.{name}" for layer in layers for name in one
  )
  if inject == "state":
    linear = "stack.prefix_layers.{}.mixer.dense.transition.linear"
    sources = [params[linear.format(layer)].shape[0] for layer in layers]
    assert sources == [1, 2, 2]
  # The gate's bottleneck does not depend on the number of sources.
  down = [params[name].shape for name in dense if name.endswith("down.kernel")]
  assert set(down) == {(16, 4)}


@each_family
def test_depth_0_is_the_base_model_exactly(family):
  tokens = random_tokens(0, B, T)
  base = random_model(model_config(family, 0, layers=3, block_layers=3))
  assert not any("dense" in name for name in get_params(base))

  def by_hand(model):
    x_BTD = model.embedding[...][tokens]
    for layer in model.stack.prefix_layers:
      x_BTD = layer(x_BTD, SEGMENTS, None, ())[0]
    return model.logits(model.norm(x_BTD))

  run = fast_jit(lambda model: model(tokens, SEGMENTS))
  expected = run(base)
  assert_trees_close(fast_jit(by_hand)(base), expected)
  for options in ({"inject": "inputs"}, {"input_norm": False}, {"transition": "linear"},
                  {"gate_init": "normal"}):
    config = model_config(family, 0, layers=3, block_layers=3, **options)
    other = with_params(abstract_model(config), get_params(base))
    np.testing.assert_array_equal(run(other), expected)


@pytest.mark.parametrize(("family", "inject", "depth"), [
    ("mamba", "inputs", 2), ("gau_retnet", "state", 2),
    pytest.param("mamba", "state", 1, marks=pytest.mark.slow),
    pytest.param("gau_retnet", "inputs", 1, marks=pytest.mark.slow),
])
def test_zero_gates_leave_the_base_model_and_still_learn(family, inject, depth):
  options = {"input_norm": False} if inject == "inputs" else {"transition": "linear"}
  config = model_config(family, depth, inject, layers=3, block_layers=3, **options)
  tokens = random_tokens(0, B, T)
  params = random_params(config)
  gates = [name for name in params if ".dense." in name and name.endswith("up.kernel")]
  assert len(gates) == 2 * (2 if inject == "inputs" else 1)
  params |= {name: jnp.zeros_like(params[name]) for name in gates}
  base = random_model(model_config(family, 0, layers=3, block_layers=3))
  shared = {name: params[name] for name in get_params(base)}
  abstract = abstract_model(config)
  weights = normal(1, B, T, 11)

  def objective(params):
    logits = with_params(abstract, params)(tokens)
    return jnp.sum(logits * weights), logits

  gradients, logits = fast_jit(jax.grad(objective, has_aux=True))(params)
  expected = fast_jit(lambda model: model(tokens))(with_params(base, shared))
  assert_trees_close(logits, expected)
  for name in gates:
    assert np.abs(gradients[name]).max() > 1e-4, name


@pytest.mark.parametrize("init", ["zeros", "normal"])
@pytest.mark.parametrize("inject", ["state", "inputs"])
def test_gates_start_as_configured_and_zero_is_exactly_nothing(inject, init):
  config = model_config("mamba", 1, inject, gate_init=init, input_norm=False)
  connection = make_connection(
      config, sources=1, inputs={"x": (E, "inner")}, query=(N,), channels=E,
      form="diagonal", rngs=nnx.Rngs(0),
  )
  x_BTD, c_BTN, own = normal(0, B, T, D), normal(1, B, T, N), normal(2, B, T, E)
  if inject == "state":
    states = _diagonal_states(5)
    own = states.read(c_BTN)
    fused = connection.run(x_BTD, c_BTN, states, [_diagonal_states(0)], Epilogue())[0].y
  else:
    inputs = connection.fuse_inputs(x_BTD, {"x": own}, [{"x": normal(3, B, T, E)}])
    fused = inputs.fused["x"]
  assert np.array_equal(fused, own) == (init == "zeros")


def _felt(family, inject, change=lambda params: params, **options):
  """Returns, for each of 4 layers, whether the last layer's output depends on it.

  The output projections of the other layers' mixers are zero, so that a layer acts only on the
  layers that read it by a dense connection.
  """
  model = random_model(model_config(family, 2, inject, layers=4, block_layers=4, **options))
  silent = {
      name: jnp.zeros_like(value) if "out_proj" in name and ".3." not in name else value
      for name, value in get_params(model).items()
  }
  weights = normal(1, B, T, D)

  @fast_jit
  def gradients(params):
    def objective(params):
      hidden, _ = with_params(model, params).hidden(random_tokens(0, B, T))
      return jnp.sum(hidden * weights)

    return jax.grad(objective)(params)

  by = gradients(change(silent))
  return [bool(np.any(by[f"stack.prefix_layers.{layer}.norm.scale"])) for layer in range(4)]


@pytest.mark.parametrize(("family", "inject"), [("mamba", "state"), ("gau_retnet", "inputs")])
def test_the_layers_that_are_read_are_the_m_nearest(family, inject):
  # Layers share unfused inputs and states, so nothing reaches a layer from beyond its sources.
  assert _felt(family, inject) == [False, True, True, True]


@pytest.mark.slow
def test_transitions_belong_to_the_sources_nearest_first():
  name = "stack.prefix_layers.3.mixer.dense.transition.linear"
  felt = _felt(
      "mamba", "state", lambda params: params | {name: params[name].at[1].set(0.0)},
      transition="linear",
  )
  assert felt == [False, False, True, True]
