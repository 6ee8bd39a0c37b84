"""One function in every mode: packing, carried states, decoding, causality.

One compiled program for each kind of model serves most tests here, because documents, parts and
prompts are data (segments, states, weights), not shapes. test_equality_matrix.py tests that all
forms of a family agree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.batch import Segments
from dense_jax.layers.stack import StackState
from dense_jax.models.language_model import ModelState
from dense_jax.models.params import (
  abstract_model,
  count_params,
  get_params,
  with_params,
)
from tests.builders import (
  FAMILIES,
  KINDS,
  VOCAB,
  each_kind,
  fast_jit,
  kind_name,
  model_config,
  normal,
  packed,
  random_like,
  random_model,
  random_params,
  random_state,
  random_tokens,
  tree_dot,
)
from tests.helpers import assert_trees_close

B, T = 3, 11
ROWS = [[4, 7], [2, 3, 6], [5, 3]]
FIRST = [3, 0, 0]  # The first row goes on with a document.


@functools.cache
def _model(kind):
  family, depth, inject = kind
  options = {"transition": "linear"} if depth == 2 and inject == "state" else {}
  # A first read near zero would have a small epsilon multiply its rounding: see the matrix.
  return random_model(model_config(family, depth, inject, norm_eps=1.0, **options))


@functools.cache
def _program(kind):
  """Makes (tokens, segments, state, weights, cotangent) -> outputs, gradients.

  The outputs are (logits, final state). The gradients are those of the sum of weights * logits and
  cotangent * final state, by the parameters and by the state's arrays.
  """
  abstract, params = abstract_model(_model(kind).config), get_params(_model(kind))

  @fast_jit
  def run(params, tokens, segments, state, weights, cotangent):
    def objective(params, layers):
      model = with_params(abstract, params)
      hidden, after = model.hidden(tokens, segments, ModelState(state.position_B, layers))
      logits = model.logits(hidden)
      return jnp.sum(weights * logits) + tree_dot(cotangent, after.layers), (logits, after)

    gradients, outputs = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, state.layers)
    return outputs, gradients

  return functools.partial(run, params)


def _run(kind, *args):
  return _program(kind)(*args)


@functools.cache
def _whole(kind):
  """Returns the program's arguments for the packed rows, and its results."""
  segments = packed(ROWS, time=T, first=FIRST)
  state = random_state(_model(kind), FIRST)
  weights = normal(2, B, T, VOCAB, scale=0.02) * segments.valid_BT[..., None]
  cotangent = jax.tree.map(lambda leaf: 0.02 * leaf, random_like(state.layers, 3))
  args = (random_tokens(1, B, T), segments, state, weights, cotangent)
  return args, _run(kind, *args)


def _add(left, right):
  return jax.tree.map(jnp.add, left, right)


@each_kind
def test_every_parameter_matters(kind):
  for name, gradient in _whole(kind)[1][1][0].items():
    assert np.abs(gradient).max() > 1e-5, name


@each_kind
def test_packed_documents_equal_the_same_documents_run_apart(kind):
  (tokens, segments, state, weights, _), _ = _whole(kind)
  nothing = jax.tree.map(jnp.zeros_like, state.layers)
  (logits, _), (by_params, by_state) = _run(kind, tokens, segments, state, weights, nothing)

  documents = [
      (row, sum(lengths[:index]), length)
      for row, lengths in enumerate(ROWS) for index, length in enumerate(lengths)
  ]
  assert len(documents) == 7
  total = jax.tree.map(jnp.zeros_like, by_params)
  for group in (documents[:3], documents[3:6], documents[6:]):
    apart = {"tokens": np.zeros((B, T), np.int32), "weights": np.zeros((B, T, VOCAB), np.float32)}
    for index, (row, begin, length) in enumerate(group):
      apart["tokens"][index, :length] = tokens[row, begin : begin + length]
      apart["weights"][index, :length] = weights[row, begin : begin + length]
    lengths = [[length] for _, _, length in group] + [[]] * (B - len(group))
    # Only the very first document goes on from a state; the others start afresh.
    first = [3, 0, 0] if group is documents[:3] or group[0] == documents[0] else [0, 0, 0]
    start = state if first[0] else ModelState(jnp.zeros(B, jnp.int32), nothing)
    (alone, _), (gradients, state_gradients) = _run(
        kind, jnp.asarray(apart["tokens"]), packed(lengths, time=T, first=first), start,
        jnp.asarray(apart["weights"]), nothing,
    )
    for index, (row, begin, length) in enumerate(group):
      assert_trees_close(alone[index, :length], logits[row, begin : begin + length])
    total = _add(total, gradients)
    if first[0]:
      assert_trees_close(state_gradients, by_state)
  assert_trees_close(total, by_params)


def _part(begin, end, tokens, segments, weights):
  """Returns columns [begin, end) of rows, padded on the right to T."""
  def cut(leaf):
    part = leaf[:, begin:end]
    return jnp.pad(part, ((0, 0), (0, T - end + begin)) + ((0, 0),) * (leaf.ndim - 2))

  return cut(tokens), jax.tree.map(cut, segments), cut(weights)


@each_kind
def test_a_run_in_two_parts_equals_the_whole_with_gradients(kind):
  (tokens, segments, state, weights, cotangent), (outputs, gradients) = _whole(kind)
  valid = segments.valid_BT[..., None]
  nothing = jax.tree.map(jnp.zeros_like, state.layers)
  for split in (1, 4, 7, 10):  # 1, 7 and 10 fall inside documents.
    first = _part(0, split, tokens, segments, weights)
    second = _part(split, T, tokens, segments, weights)
    (logits_1, between), _ = _run(kind, *first[:2], state, first[2], nothing)
    (logits_2, after), by_second = _run(kind, *second[:2], between, second[2], cotangent)
    # The gradient through the carried state.
    _, by_first = _run(kind, *first[:2], state, first[2], by_second[1])
    logits = jnp.concatenate([logits_1[:, :split], logits_2[:, : T - split]], axis=1)
    assert_trees_close((logits * valid, after), (outputs[0] * valid, outputs[1]))
    assert_trees_close((_add(by_first[0], by_second[0]), by_first[1]), gradients)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[9]], ids=kind_name)
def test_parts_of_their_own_lengths_equal_the_whole(kind):
  """Parts without segments or padding, compiled with their own shapes, equal the whole too."""
  model = _model(kind)
  tokens, weights = random_tokens(1, B, T), normal(2, B, T, VOCAB, scale=0.02)
  state = random_state(model, [3, 1, 20])

  def in_parts(params, layers):
    bound, after = with_params(model, params), ModelState(state.position_B, layers)
    logits = []
    for part in (slice(None, 4), slice(4, None)):
      hidden, after = bound.hidden(tokens[:, part], None, after)
      logits.append(bound.logits(hidden))
    logits = jnp.concatenate(logits, axis=1)
    return jnp.sum(weights * logits), (logits, after)

  run = fast_jit(jax.grad(in_parts, argnums=(0, 1), has_aux=True))
  gradients, outputs = run(get_params(model), state.layers)
  # The whole has segments, which no document of theirs resets.
  segments = Segments(state.position_B[:, None] + jnp.arange(T)[None], jnp.ones((B, T), jnp.int32))
  nothing = jax.tree.map(jnp.zeros_like, state.layers)
  assert_trees_close(
      (outputs, gradients), _run(kind, tokens, segments, state, weights, nothing)
  )


@functools.cache
def _steps(kind):
  """Makes (state, tokens_BT) -> logits_BTV and the states after each token, time second."""
  @fast_jit
  def run(model, state, tokens):
    def body(state, tokens_B):
      state, logits_BV = model.step(state, tokens_B)
      return state, (logits_BV, state)

    _, (logits, states) = jax.lax.scan(body, state, tokens.T)
    return jnp.swapaxes(logits, 0, 1), states

  return functools.partial(run, _model(kind))


def _at(states, index_B):
  """Returns each row's state after token `index_B`, from a scan's states [T, ..., B, ...]."""
  def pick(leaf, batch_axis):
    rows = [jnp.take(leaf[index], row, axis=batch_axis) for row, index in enumerate(index_B)]
    return jnp.stack(rows, axis=batch_axis)

  prefix = jax.tree.map(lambda leaf: pick(leaf, 0), states.layers.prefix_layers)
  scanned = jax.tree.map(lambda leaf: pick(leaf, 1), states.layers.scanned_layers)
  return ModelState(pick(states.position_B, 0), StackState(prefix, scanned))


@each_kind
def test_prefill_and_steps_equal_the_full_forward(kind):
  """Reads right-padded prompts of different lengths from a fresh state, then token by token."""
  model, tokens, lengths = _model(kind), random_tokens(4, B, T), [5, 11, 1]
  fresh = model.init_state(B)
  step = _steps(kind)
  single_logits, single_states = step(fresh, tokens)
  # Without padding: all tokens at once are the same as one by one.
  (full, after), _ = _run(
      kind, tokens, packed([[T]] * B, time=T), fresh, jnp.zeros((B, T, VOCAB)),
      jax.tree.map(jnp.zeros_like, fresh.layers),
  )
  assert_trees_close(single_logits, full)
  assert_trees_close(_at(single_states, [T - 1] * B), after)

  prefill = fast_jit(lambda model, tokens, segments: model.prefill(tokens, segments))
  state, logits = prefill(model, tokens, packed([[n] for n in lengths], time=T))
  assert_trees_close(logits, jnp.stack([full[row, n - 1] for row, n in enumerate(lengths)]))
  assert_trees_close(state, _at(single_states, [n - 1 for n in lengths]))

  following = jnp.stack([jnp.roll(tokens[row], -n) for row, n in enumerate(lengths)])
  continued, _ = step(state, following)
  for row, length in enumerate(lengths):
    assert_trees_close(continued[row, : T - length], full[row, length:])


@each_kind
def test_causality_and_documents_by_gradient(kind):
  """In rows of 11 different tokens, the embedding's gradient tells which were read."""
  tokens = jnp.stack([jnp.asarray(np.random.default_rng(row).permutation(T)) for row in range(B)])
  fresh = _model(kind).init_state(B)
  nothing = jax.tree.map(jnp.zeros_like, fresh.layers)
  for rows, reads in (
      ([[T]] * B, {0: range(0, 1), 4: range(0, 5), T - 1: range(0, T)}),
      ([[2, 9]] * B, {1: range(0, 2), 2: range(2, 3), 7: range(2, 8)}),
  ):
    for t, expected in reads.items():
      weights = jnp.zeros((B, T, VOCAB)).at[0, t].set(normal(5, VOCAB))
      _, (by_params, _) = _run(kind, tokens, packed(rows, time=T), fresh, weights, nothing)
      gradient = np.abs(by_params["embedding"][tokens[0]]).max(axis=1)
      assert np.all(gradient[list(expected)] > 0), (t, gradient)
      assert np.all(np.delete(gradient, list(expected)) == 0), (t, gradient)


OPTIONS = {
    "mamba": {"state_size": 3, "conv_width": 4, "dt_rank": 2},
    "mamba2": {"state_size": 3, "conv_width": 4, "head_dim": 8, "groups": 2},
    "gau_retnet": {"key_dim": 12, "heads": 2},
    "retnet": {"key_dim": 12, "heads": 2, "ffn_width": 24},
    "s4": {"state_size": 6, "ffn_width": 24},
    "s4d": {"state_size": 6, "ffn_width": 24},
    "transformer": {"heads": 4, "kv_heads": 2, "head_dim": 6, "ffn_width": 24},
}


def _mixer_count(family, width, state_size=0, conv_width=0, dt_rank=0, head_dim=0, groups=0,
                 key_dim=0, heads=0, kv_heads=0, ffn_width=0):
  """Counts a layer's parameters except its first norm, by hand."""
  inner = 2 * width
  feed_forward = width + 2 * width * ffn_width  # With its norm.
  match family:
    case "mamba":
      count = width * 2 * inner + conv_width * inner + inner  # in_proj, convolution
      count += inner * (dt_rank + 2 * state_size) + dt_rank * inner + inner  # dt, B, C
      return count + inner * state_size + inner + inner * width  # A, D, out_proj
    case "mamba2":
      convolved, heads = inner + 2 * groups * state_size, inner // head_dim
      count = width * (inner + convolved + heads) + (conv_width + 1) * convolved
      return count + 3 * heads + inner + inner * width  # dt, A, D; norm; out_proj
    case "gau_retnet":
      return 2 * width * key_dim + width * 2 * inner + inner // heads + inner * width
    case "retnet":
      return 2 * width * key_dim + 3 * width * inner + feed_forward
    case "s4" | "s4d":
      # A, B, C and S4's P are N numbers a channel; dt and D are one.
      numbers = state_size * (4 if family == "s4" else 3) + 2
      return width * numbers + width * 2 * width + feed_forward
    case "transformer":
      return 2 * width * head_dim * (heads + kv_heads) + feed_forward + width * ffn_width
  raise AssertionError(f"count {family} by hand")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_parameter_counts(family, tied):
  config = model_config(family, layers=4, tie_embeddings=tied, **OPTIONS[family])
  width = config.width
  expected = VOCAB * width * (1 if tied else 2) + width
  expected += 4 * (width + _mixer_count(family, width, **OPTIONS[family]))
  assert count_params(get_params(abstract_model(config))) == expected
  assert count_params(random_params(config)) == expected


def test_published_parameter_counts():
  def count(config):
    return count_params(get_params(abstract_model(config)))

  mamba_130m = model_config(
      "mamba", vocab_size=50280, width=768, layers=24, state_size=16, conv_width=4, dt_rank=48,
      tie_embeddings=True,
  )
  assert count(mamba_130m) == 129_135_360  # state-spaces/mamba-130m
  mamba2_130m = model_config(
      "mamba2", vocab_size=50288, width=768, layers=24, state_size=128, conv_width=4, head_dim=64,
      groups=1, tie_embeddings=True,
  )
  assert count(mamba2_130m) == 128_989_632  # state-spaces/mamba2-130m
  # The design's section 10: about 368M and 1.33B with their dense connections.
  sizes = ((1536, 768, 2, 16, 368e6), (2560, 1280, 4, 25, 1.33e9))
  for width, key_dim, heads, layers, expected in sizes:
    config = model_config(
        "gau_retnet", 1, "inputs", vocab_size=32000, width=width, layers=layers,
        key_dim=key_dim, heads=heads, gate_reduction=32,
    )
    assert abs(count(config) / expected - 1) < 5e-3
