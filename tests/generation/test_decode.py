"""Generation gives the tokens of the full forward pass, for prompts of any length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.errors import InputError
from dense_jax.generation import decode
from dense_jax.generation.decode import Generator, pad_prompts
from dense_jax.generation.sampling import Sampling
from dense_jax.models.params import unrolled
from tests.builders import (
  KINDS,
  VOCAB,
  each_family,
  fast_jit,
  model_config,
  random_model,
  with_kinds,
)

BLOCK = 8
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9]]  # The last is longer than a block.
NEW = 20  # More than two blocks.


@pytest.fixture(autouse=True, scope="module")
def _short_blocks():
  """Uses blocks of 8 tokens instead of 64: the same code and its borders, in less time."""
  before, decode._BLOCK = decode._BLOCK, BLOCK
  yield
  decode._BLOCK = before


@functools.cache
def _model(family):
  kinds = {"gau_retnet": (2, "inputs"), "transformer": (0, "state")}
  depth, inject = kinds.get(family, (1, "state"))
  return random_model(model_config(family, depth, inject, layers=4))


@functools.cache
def _greedy(family):
  return Generator(_model(family), Sampling(temperature=0))


@functools.cache
def _sampling(family):
  return Generator(_model(family), Sampling(temperature=1.0))


def _naive(model, prompt, new):
  """Takes the argmax of a full forward pass per token, on padded rows: the model is causal."""
  run = fast_jit(lambda model, tokens: model(tokens))
  tokens = list(prompt)
  margins = []
  for _ in range(new):
    row = jnp.asarray([tokens + [0] * (32 - len(tokens))])
    logits = np.sort(run(model, row)[0, len(tokens) - 1])
    margins.append(logits[-1] - logits[-2])
    tokens.append(int(np.argmax(run(model, row)[0, len(tokens) - 1])))
  assert min(margins) > 1e-4  # No tie that rounding would decide.
  return tokens[len(prompt):]


@each_family
def test_greedy_generation_is_the_argmax_of_full_forward_passes(family):
  """The batch has prompts of different lengths."""
  expected = [_naive(_model(family), prompt, NEW) for prompt in PROMPTS]
  assert _greedy(family)(PROMPTS, max_new_tokens=NEW) == expected
  assert len({token for row in expected for token in row}) > 3


@each_family
def test_prompts_in_one_batch_equal_one_by_one(family):
  together = _greedy(family)(PROMPTS, max_new_tokens=NEW)
  alone = [_greedy(family)([prompt], max_new_tokens=NEW)[0] for prompt in PROMPTS]
  assert together == alone


@each_family
def test_seeds_reproduce(family):
  generate = _sampling(family)
  first = generate(PROMPTS, max_new_tokens=NEW, seed=1)
  assert generate(PROMPTS, max_new_tokens=NEW, seed=1) == first
  assert generate(PROMPTS, max_new_tokens=NEW, seed=2) != first
  # A longer continuation begins with the shorter one.
  longer = generate(PROMPTS, max_new_tokens=NEW + 5, seed=1)
  assert [row[:NEW] for row in longer] == first
  # Each block has a key of its own.
  blocks = generate.stream(PROMPTS, seed=1)
  assert not np.array_equal(next(blocks), next(blocks))


def test_stopping():
  generate = _greedy("mamba")
  full = generate(PROMPTS, max_new_tokens=NEW)
  assert generate(PROMPTS, max_new_tokens=1) == [row[:1] for row in full]
  stop = full[0][3]
  expected = [row[: row.index(stop)] if stop in row else row for row in full]
  assert generate(PROMPTS, max_new_tokens=NEW, stop_id=stop) == expected
  assert generate(PROMPTS, max_new_tokens=NEW, stop_id=VOCAB) == full


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_a_prompt_without_tokens_is_an_error(prompts):
  with pytest.raises(InputError, match="prompt"):
    _greedy("mamba")(prompts, max_new_tokens=1)


def test_prompts_are_padded_on_the_right():
  tokens, segments = pad_prompts(PROMPTS, 4)
  assert tokens.shape == (3, 12)
  for row, prompt in enumerate(PROMPTS):
    length = len(prompt)
    assert tokens[row, :length].tolist() == prompt
    assert segments.ids_BT[row].tolist() == [1] * length + [0] * (12 - length)
    assert segments.positions_BT[row, :length].tolist() == list(range(length))


@with_kinds([kind for kind in KINDS if kind[1] != 1])
def test_the_state_has_the_same_size_after_any_prompt(kind):
  """The state that decoding carries does not grow with the tokens that were read."""
  family, depth, inject = kind
  model = unrolled(random_model(model_config(family, depth, inject, layers=4)))

  def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

  fresh = jax.eval_shape(lambda: model.init_state(2))
  for time in (1, 40):
    tokens = jnp.zeros((2, time), jnp.int32)
    after, _ = jax.eval_shape(model.prefill, tokens)
    stepped, _ = jax.eval_shape(model.step, after, tokens[:, 0])
    assert shapes(after) == shapes(stepped) == shapes(fresh)


def test_compiled_decoding_holds_the_same_memory_at_any_position():
  """One program serves all positions, so its arguments and temporaries have fixed sizes."""
  generate = _greedy("mamba")
  sizes = set()
  for length in (1, 8, 40):
    tokens, segments = pad_prompts([[1] * length], BLOCK)
    state, logits = jax.eval_shape(generate._prefill, generate._params, tokens, segments)
    lowered = generate._decode.lower(generate._params, state, logits, jax.random.key(0))
    memory = lowered.compile().memory_analysis()
    sizes.add((memory.argument_size_in_bytes, memory.temp_size_in_bytes))
  assert len(sizes) == 1
