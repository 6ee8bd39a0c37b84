"""Tests of attention: by hand, in parts, step by step, with packed documents and other dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import DenseConfig, ModelConfig
from dense_jax.errors import InputError
from dense_jax.layers.attention import Attention, AttentionConfig, AttentionState, ffn_width
from dense_jax.layers.feed_forward import FeedForward
from dense_jax.models.language_model import LanguageModel
from tests.builders import fast_jit, normal, packed, tree_dot
from tests.helpers import assert_trees_close

B, T, D = 3, 11, 16
HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 4, 2, 6, 5
ROWS = [[4, 7], [2, 3, 6], [5, 3]]
FIRST = [8, 0, 2]  # The first row continues beyond the context, the third within it.


def _config(**options):
  mixer = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "context": CONTEXT,
           "rope_theta": 100.0}
  mixer |= {name: options.pop(name) for name in list(options) if hasattr(AttentionConfig, name)}
  values = {"family": "transformer", "vocab_size": 11, "width": D, "layers": 2} | options
  return ModelConfig(mixer=AttentionConfig(**mixer), **values)


def _randomized(module):
  """Returns the module with random weights that give results of unit scale."""
  graph, state = nnx.split(module)
  leaves, structure = jax.tree.flatten(state)
  rng = np.random.default_rng(0)
  leaves = [
      jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0]), jnp.float32)
      for leaf in leaves
  ]
  return nnx.merge(graph, structure.unflatten(leaves))


@functools.cache
def _layer(**options):
  return _randomized(Attention(_config(**options), sources=0, rngs=nnx.Rngs(0)))


def _state(seed=1):
  shape = (B, CONTEXT, KV_HEADS, HEAD_DIM)
  return AttentionState(normal(seed, *shape), normal(seed + 1, *shape))


@fast_jit
def _call(layer, x, segments, state):
  output = layer(x, segments, state, ())
  return output.y, output.state


@fast_jit
def _gradients(layer, x, segments, state, weights, cotangent):
  """Returns gradients of sum(weights * y) + sum(cotangent * final state), and the outputs."""
  graph, params = nnx.split(layer)

  def objective(params, x, state):
    output = nnx.merge(graph, params)(x, segments, state, ())
    return jnp.sum(weights * output.y) + tree_dot(cotangent, output.state), (
        output.y, output.state)

  gradients, outputs = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(params, x, state)
  return outputs, gradients


def _rotated(x, position):
  """Rotates one token's [heads, N] in half-split layout, as a complex product."""
  half = x.shape[-1] // 2
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
      1j * position * 100.0 ** (-2 * np.arange(half) / x.shape[-1]))
  return np.concatenate([turned.real, turned.imag], axis=-1)


def _by_hand(layer, x, segments, state):
  """Computes attention token by token from lists of keys and values; returns y and final rings."""
  kernels = [np.asarray(getattr(layer, name).kernel[...], np.float64)
             for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
  x, positions = np.asarray(x, np.float64), np.broadcast_to(segments.positions_BT, x.shape[:2])
  ids = np.ones(x.shape[:2]) if segments.ids_BT is None else segments.ids_BT
  rings = [np.array(leaf, np.float64) for leaf in (state.k_BCJN, state.v_BCJN)]
  before, outputs = [ring.copy() for ring in rings], np.zeros(x.shape)
  for row in range(len(x)):
    held = {p: tuple(ring[row, p % CONTEXT] for ring in before)
            for p in range(max(0, positions[row, 0] - CONTEXT), positions[row, 0])}
    for t in range(x.shape[1]):
      p = int(positions[row, t])
      if not ids[row, t]:
        continue
      held = held if p else {}
      q, k, v = ((x[row, t] @ kernel).reshape(-1, HEAD_DIM) for kernel in kernels[:3])
      held[p] = _rotated(k, p), v
      window = [held[s] for s in range(max(0, p - CONTEXT + 1), p + 1)]
      y = []
      for head, query in enumerate(_rotated(q, p)):
        shared = head // (HEADS // KV_HEADS)
        scores = np.exp([query @ keys[shared] / np.sqrt(HEAD_DIM) for keys, _ in window])
        y.append(sum(s * values[shared] for s, (_, values) in zip(scores, window, strict=True))
                 / scores.sum())
      outputs[row, t] = np.concatenate(y) @ kernels[3]
    last = max(held, default=-1)
    for part, ring in enumerate(rings):
      ring[row] = 0
      for p in range(max(0, last - CONTEXT + 1), last + 1):
        ring[row, p % CONTEXT] = held[p][part]
  return outputs, AttentionState(*rings)


@pytest.mark.parametrize("segments", [
    packed(ROWS, time=T, first=FIRST),
    Segments(jnp.asarray([[8], [0], [2]]) + jnp.arange(T)[None]),
    Segments(2 + jnp.arange(T)[None]),
    Segments(jnp.arange(T)[None]),
    Segments(jnp.arange(3)[None]),
], ids=["packed", "carried", "carried-alike", "fresh", "shorter-than-the-context"])
def test_equals_attention_by_hand(segments):
  x, state = normal(0, B, segments.positions_BT.shape[1], D), _state()
  y, after = _call(_layer(), x, segments, state)
  expected, rings = _by_hand(_layer(), x, segments, state)
  if segments.ids_BT is not None:
    y = y * segments.valid_BT[..., None]
  assert_trees_close((y, after), (expected, rings))


@pytest.mark.parametrize("segments", [
    packed([[11], [2, 9], [5, 3]], time=T), Segments(jnp.arange(T)[None]),
    Segments(jnp.arange(4)[None]),
], ids=["packed", "whole", "short"])
def test_no_state_equals_a_fresh_one(segments):
  x = normal(0, B, segments.positions_BT.shape[1], D)
  fresh = _layer().init_state(B)
  assert_trees_close(
      _call(_layer(), x, segments, None), _call(_layer(), x, segments, fresh)
  )


@functools.cache
def _whole():
  segments = packed(ROWS, time=T, first=FIRST)
  weights = normal(3, B, T, D) * segments.valid_BT[..., None]
  args = normal(0, B, T, D), segments, _state(), weights, _state(5)
  return args, _gradients(_layer(), *args)


def test_packed_documents_equal_the_same_documents_run_apart():
  (x, segments, state, weights, _), _ = _whole()
  nothing = jax.tree.map(jnp.zeros_like, state)
  (y, _), (by_params, by_x, by_state) = _gradients(
      _layer(), x, segments, state, weights, nothing)
  total = jax.tree.map(jnp.zeros_like, by_params)
  for row, lengths in enumerate(ROWS):
    for index, length in enumerate(lengths):
      begin = sum(lengths[:index])
      part = (slice(row, row + 1), slice(begin, begin + length))
      first = 0 if index else FIRST[row]
      start = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], state if first else nothing)
      (alone, _), (gradients, x_gradient, state_gradient) = _gradients(
          _layer(), x[part], Segments(first + jnp.arange(length)[None]), start, weights[part],
          jax.tree.map(jnp.zeros_like, start),
      )
      total = jax.tree.map(jnp.add, total, gradients)
      assert_trees_close((alone, x_gradient), (y[part], by_x[part]))
      if first:
        expected = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], by_state)
        assert_trees_close(state_gradient, expected)
  assert_trees_close(total, by_params)


@pytest.mark.parametrize("split", [1, 4, 6, 9])
def test_two_parts_equal_the_whole_with_gradients(split):
  (x, segments, state, weights, cotangent), ((y, after), whole) = _whole()
  nothing = jax.tree.map(jnp.zeros_like, state)

  def cut(leaf, begin, end):
    part = leaf[:, begin:end]
    return jnp.pad(part, ((0, 0), (0, T - end + begin)) + ((0, 0),) * (leaf.ndim - 2))

  first, second = (
      [jax.tree.map(lambda leaf, a=a, b=b: cut(leaf, a, b), leaf) for leaf in (x, segments)]
      for a, b in ((0, split), (split, T)))
  weights = cut(weights, 0, split), cut(weights, split, T)
  (y_1, between), _ = _gradients(_layer(), *first, state, weights[0], nothing)
  (y_2, end), by_second = _gradients(_layer(), *second, between, weights[1], cotangent)
  _, by_first = _gradients(_layer(), *first, state, weights[0], by_second[2])
  valid = segments.valid_BT[..., None]
  joined = jnp.concatenate([y_1[:, :split], y_2[:, : T - split]], axis=1)
  assert_trees_close((joined * valid, end), (y * valid, after))
  assert_trees_close(jax.tree.map(jnp.add, by_first[0], by_second[0]), whole[0])
  by_x = jnp.concatenate([by_first[1][:, :split], by_second[1][:, : T - split]], axis=1)
  assert_trees_close((by_x, by_first[2]), (whole[1], whole[2]))


def test_steps_equal_the_sequence_beyond_the_context_and_its_padded_parts():
  layer, x = _layer(), normal(0, B, T, D)

  @fast_jit
  def steps(layer, x, state, position):
    def body(carry, x_BD):
      position, state = carry
      output = layer(x_BD, Token(position), state, ())
      return (position + 1, output.state), (output.y, output.state)

    _, (y, states) = jax.lax.scan(body, (position, state), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(y, 0, 1), states

  y, states = steps(layer, x, layer.init_state(B), jnp.zeros(B, jnp.int32))
  whole, after = _call(layer, x, Segments(jnp.arange(T)[None]), None)
  assert_trees_close((y, jax.tree.map(lambda leaf: leaf[-1], states)), (whole, after))
  assert after.k_BCJN.shape == (B, CONTEXT, KV_HEADS, HEAD_DIM)

  # Prompts of different lengths, padded on the right; then the rest step by step.
  lengths = [3, 7, 11]
  prompts, ragged = _call(layer, x, packed([[n] for n in lengths], time=T), None)
  for row, n in enumerate(lengths):
    expected = jax.tree.map(lambda leaf, row=row, n=n: leaf[n - 1, row], states)
    assert_trees_close(jax.tree.map(lambda leaf, row=row: leaf[row], ragged), expected)
    assert_trees_close(prompts[row, :n], whole[row, :n])
  following = jnp.stack([jnp.roll(x[row], -n, axis=0) for row, n in enumerate(lengths)])
  continued, _ = steps(layer, following, ragged, jnp.asarray(lengths))
  for row, n in enumerate(lengths):
    assert_trees_close(continued[row, : T - n], whole[row, n:])


def test_a_row_that_is_all_padding_keeps_its_state():
  x, state = normal(0, B, 4, D), _state()
  _, after = _call(_layer(), x, packed([[4], [], [2]], time=4), state)
  assert_trees_close(*(jax.tree.map(lambda leaf: leaf[1], tree) for tree in (after, state)))


def test_bfloat16_is_near_and_its_softmax_is_float32():
  layer = _layer(dtype="bfloat16")
  x, segments = normal(0, B, T, D), Segments(jnp.arange(T)[None])
  y, after = _call(layer, x.astype(jnp.bfloat16), segments, layer.init_state(B))
  expected, _ = _call(_layer(), x, segments, None)
  assert y.dtype == after.k_BCJN.dtype == after.v_BCJN.dtype == jnp.bfloat16
  distance = jnp.sqrt(jnp.mean((y.astype(jnp.float32) - expected) ** 2)) / jnp.std(expected)
  assert_trees_close(distance, 0.0, "bfloat16")
  for state in (None, layer.init_state(B)):
    text = str(jax.make_jaxpr(lambda x, s=state: layer(x, segments, s, ()).y)(
        x.astype(jnp.bfloat16)))
    exponentials = [line for line in text.splitlines() if " exp " in line]
    assert exponentials
    assert all(":f32[" in line for line in exponentials)


@pytest.mark.slow
def test_the_layer_around_it():
  """The layer is x + attention(norm(x)), then x + swiglu(norm(x)); for a sequence and a token."""
  model = _randomized(LanguageModel(_config(layers=1, ffn_width=24), rngs=nnx.Rngs(0)))
  (layer,), x = model.stack.prefix_layers, normal(0, B, T, D)
  segments = Segments(jnp.arange(T)[None])
  between = x + layer.mixer(layer.norm(x), segments, None, ()).y
  inner = layer.ffn_norm(between)
  parts = layer.feed_forward
  gate, up = inner @ parts.gate_proj.kernel[...], inner @ parts.up_proj.kernel[...]
  expected = between + (gate * jax.nn.sigmoid(gate) * up) @ parts.down_proj.kernel[...]
  actual, *_ = model.stack(x, segments, None)
  assert_trees_close(actual, expected)
  first = Token(jnp.zeros(B, jnp.int32))
  token, *_ = model.stack(x[:, 0], first, model.stack.init_state(B))
  assert_trees_close(token, expected[:, 0])


def test_gelu_is_the_exact_one():
  layer = _randomized(FeedForward(_config(), 24, kind="gelu", rngs=nnx.Rngs(0)))
  x = normal(0, B, D)
  up = x @ layer.up_proj.kernel[...]
  expected = (up * (1 + jax.scipy.special.erf(up / np.sqrt(2))) / 2) @ layer.down_proj.kernel[...]
  assert_trees_close(layer(x), expected)


@pytest.mark.parametrize(("width", "expected"), [(16, 64), (192, 512), (768, 2048), (4096, 10944)])
def test_the_feed_forward_layers_default_width(width, expected):
  assert ffn_width(_config(width=width)) == expected


@pytest.mark.parametrize(("options", "parts"), [
    ({"kv_heads": 3}, ("mixer.kv_heads = 3", "a divisor of heads = 4")),
    ({"head_dim": 5}, ("mixer.head_dim = 5", "an even integer")),
    ({"head_dim": 0, "width": 20}, ("mixer.heads = 4", "width = 20", "head_dim")),
    ({"dense": DenseConfig(depth=1)}, ("dense.depth = 1", "expected 0")),
    ({"implementation": "chunked"}, ("implementation = 'chunked'", "auto")),
])
def test_what_does_not_fit_is_named(options, parts):
  with pytest.raises(InputError) as error:
    Attention(_config(**options), sources=0, rngs=nnx.Rngs(0))
  for part in parts:
    assert part in str(error.value)
