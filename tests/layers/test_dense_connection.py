"""Dense hidden connections: equations (3) to (5) by hand, zero gates, few sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dense_jax.layers.dense_connection import DenseConnection
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.ops.states import DiagonalState, MatrixState, scan_diagonal, scan_matrix
from tests.builders import (
    FAMILIES,
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
  """A connection of depth 2 whose parameters are all random; they are returned too."""
  config = model_config("mamba", 2, inject, layers=4, **options)
  module = DenseConnection(
      config, sources=sources, inputs={"b": (N, None), "x": (E, "inner")}, query=query,
      channels=E, rngs=nnx.Rngs(0),
  )
  graph, state = nnx.split(module)
  state = jax.tree.map(lambda leaf: leaf + normal(leaf.size, *leaf.shape, scale=0.5), state)
  return nnx.merge(graph, state)


def _gate(gate, x):
  """silu(silu(x W1) W2), by hand."""
  return jax.nn.silu(jax.nn.silu(x @ gate.down.kernel[...]) @ gate.up.kernel[...])


def _diagonal_states(seed):
  return scan_diagonal(
      jax.nn.softplus(normal(seed, B, T, E)), -jnp.exp(normal(seed + 1, N, E)),
      normal(seed + 2, B, T, E), normal(seed + 3, B, T, N), normal(seed, B, T, N), SEGMENTS,
      normal(seed + 4, B, N, E), implementation="recurrent", chunk=3,
  )[1]


def _matrix_states(seed):
  return scan_matrix(
      normal(seed, B, T, H, N), normal(seed + 1, B, T, H, P), -jnp.exp(normal(seed + 2, B, T, H)),
      SEGMENTS, normal(seed + 3, B, H, P, N), implementation="chunked", chunk=3,
  )


def _by_hand(connection, form, x_BTD, states, query, gate):
  """Equations (3) and (4) with the states themselves: y = C (h + sum_i gate * (W_i h_i))."""
  project, read = {
      "diagonal": ("nm,btme->btne", "btne,btn->bte"),
      "matrix": ("hnm,bthpm->bthpn", "bthpn,bthn->bthp"),
  }[form]
  fused = states[0].materialize()
  for index, source in enumerate(states[1:]):
    h = source.materialize()
    if connection.linear:
      h = jnp.einsum(project, connection.transition[...][index], h)
    fused += gate * h
  return jnp.einsum(read, fused, query)


@pytest.mark.parametrize(("sources", "transition", "remat"), [
    (1, "identity", "none"), (2, "identity", "none"), (1, "linear", "none"), (2, "linear", "full"),
])
@pytest.mark.parametrize("form", ["diagonal", "matrix"])
def test_state_injection_is_equations_3_and_4(form, sources, transition, remat):
  query_shape = {"diagonal": (N,), "matrix": (H, N)}[form]
  connection = _connection("state", sources, query_shape, transition=transition, remat=remat)
  x_BTD, query = normal(90, B, T, D), normal(91, B, T, *query_shape)

  @fast_jit
  def both(connection):
    make = {"diagonal": _diagonal_states, "matrix": _matrix_states}[form]
    states = [make(10 * index) for index in range(1 + sources)]
    gate = _gate(connection.gate, x_BTD)
    gate = gate[:, :, None] if form == "diagonal" else gate.reshape(B, T, H, P)[..., None]
    expected = _by_hand(connection, form, x_BTD, states, query, gate)
    own = states[0].read(query)
    sequence = connection.fuse_reads(x_BTD, own, query, states[1:])
    # One token of decoding is the same.
    token = {"diagonal": DiagonalState, "matrix": MatrixState}[form]
    last = [token(state.materialize()[:, 2]) for state in states[1:]]
    one = connection.fuse_reads(x_BTD[:, 2], own[:, 2], query[:, 2], last)
    return sequence, one, expected

  sequence, one, expected = both(connection)
  valid = np.asarray(SEGMENTS.valid_BT)
  assert_trees_close(sequence[valid], expected[valid])
  assert_trees_close(one, expected[:, 2])


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
    gate = _gate(connection.gates[name], x_BTD)
    total = own[name] + sum(gate * source[name] for source in shallow)
    if input_norm:
      mean_square = jnp.mean(total**2, axis=-1, keepdims=True)
      scale = connection.norms[name].scale[...][None, None]
      total = total / jnp.sqrt(mean_square + 1e-5) * scale
    expected[name] = total
  assert_trees_close(connection.fuse_inputs(x_BTD, own, shallow), expected)
  # The other injection's place in a mixer does nothing.
  assert connection.fuse_reads(x_BTD, own["x"], own["b"], shallow) is own["x"]


@pytest.mark.parametrize("inject", ["state", "inputs"])
def test_no_sources_is_the_identity_without_parameters(inject):
  connection = _connection(inject, 0)
  assert not jax.tree.leaves(nnx.state(connection))
  own = {"b": normal(0, B, T, N)}
  assert connection.fuse_inputs(normal(1, B, T, D), own, ()) is own
  assert connection.fuse_reads(normal(1, B, T, D), own["b"], own["b"], ()) is own["b"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inject", ["state", "inputs"])
def test_each_layer_has_one_gate_for_all_its_sources(family, inject):
  options = {"transition": "linear"} if inject == "state" else {}
  config = model_config(family, 2, inject, layers=4, **options)
  params = get_params(abstract_model(config))
  dense = sorted(name for name in params if ".dense." in name)
  inputs = {"mamba": "bx", "gau_retnet": "kv"}[family]
  if inject == "state":
    one = ["gate.down.kernel", "gate.up.kernel", "transition"]
  else:
    one = [f"gates.{name}.{part}.kernel" for name in inputs for part in ("down", "up")]
    one += [f"norms.{name}.scale" for name in inputs]
  # Layer 0 reads nothing and so has none of them.
  layers = (1, 2, 3)
  assert dense == sorted(
      f"stack.head.{layer}.mixer.dense.{name}" for layer in layers for name in one
  )
  if inject == "state":
    sources = [params[f"stack.head.{layer}.mixer.dense.transition"].shape[0] for layer in layers]
    assert sources == [1, 2, 2]
  # The gate's bottleneck does not depend on the number of sources.
  down = [params[name].shape for name in dense if name.endswith("down.kernel")]
  assert set(down) == {(16, 4)}


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_0_is_the_base_model_exactly(family):
  tokens = random_tokens(0, B, T)
  base = random_model(model_config(family, 0, layers=3, block_layers=3))
  assert not any("dense" in name for name in get_params(base))

  def by_hand(model):
    x_BTD = model.embedding[...][tokens]
    for layer in model.stack.head:
      x_BTD = layer(x_BTD, SEGMENTS, layer.mixer.init_state(B), ())[0]
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
    ("mamba", "state", 1), ("mamba", "inputs", 2), ("gau_retnet", "state", 2),
    ("gau_retnet", "inputs", 1),
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
  connection = DenseConnection(
      config, sources=1, inputs={"x": (E, "inner")}, query=(N,), channels=E, rngs=nnx.Rngs(0)
  )
  x_BTD, c_BTN, own = normal(0, B, T, D), normal(1, B, T, N), normal(2, B, T, E)
  if inject == "state":
    fused = connection.fuse_reads(x_BTD, own, c_BTN, [_diagonal_states(0)])
  else:
    fused = connection.fuse_inputs(x_BTD, {"x": own}, [{"x": normal(3, B, T, E)}])["x"]
  assert np.array_equal(fused, own) == (init == "zeros")


def _felt(family, inject, change=lambda params: params, **options):
  """Which of 4 layers the last one's output depends on, the others writing nothing to it.

  Without its mixer's output projection a layer is felt only by those that read it.
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
  return [bool(np.any(by[f"stack.head.{layer}.norm.scale"])) for layer in range(4)]


@pytest.mark.parametrize(("family", "inject"), [("mamba", "state"), ("gau_retnet", "inputs")])
def test_the_layers_that_are_read_are_the_m_nearest(family, inject):
  # With inputs shared before their fusion, and raw states, nothing is passed further on.
  assert _felt(family, inject) == [False, True, True, True]


def test_transitions_belong_to_the_sources_nearest_first():
  name = "stack.head.3.mixer.dense.transition"
  felt = _felt(
      "mamba", "state", lambda params: params | {name: params[name].at[1].set(0.0)},
      transition="linear",
  )
  assert felt == [False, False, True, True]
