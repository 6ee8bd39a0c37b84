"""Generation gives the tokens of the full forward pass, the same in every batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.errors import InputError
from dense_jax.generation import programs
from dense_jax.generation.generator import Generator
from dense_jax.generation.requests import Request
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
from tests.generation.tokenizers import Letters
from tests.helpers import assert_trees_close

ROWS = 4  # Fewer than requests, in some tests.
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9] * 3]  # The last takes several chunks.
NEW = 20  # More than two blocks.
GREEDY = Sampling(temperature=0)
SAMPLINGS = [Sampling(), Sampling(0.7, top_k=4, repetition_penalty=1.5), Sampling(2.0, top_p=0.8)]


@pytest.fixture(autouse=True, scope="module")
def _short_blocks():
  """Uses short blocks and chunks: the same code and its borders, in less time."""
  before = programs.BLOCK, programs.CHUNKS
  programs.BLOCK, programs.CHUNKS = 8, (16, 4)
  yield
  programs.BLOCK, programs.CHUNKS = before


@functools.cache
def _model(family):
  kinds = {"gau_retnet": (2, "inputs"), "transformer": (0, "state")}
  depth, inject = kinds.get(family, (1, "state"))
  return random_model(model_config(family, depth, inject, layers=3), seed=3)


@functools.cache
def _generator(family):
  return Generator(_model(family), Letters(), batch_size=ROWS)


def _requests(samplings=(GREEDY,) * 3, **values):
  return [
      Request(prompt, sampling, **{"max_new_tokens": NEW, "seed": 1} | values)
      for prompt, sampling in zip(PROMPTS, samplings, strict=True)
  ]


def _ids(results):
  return [result.ids for result in results]


@functools.cache
def _forward(family):
  """Makes tokens -> the logits of a full forward pass after the last, on padded rows."""
  run = fast_jit(lambda model, tokens: model(tokens))

  def logits(tokens):
    row = jnp.asarray([list(tokens) + [0] * (64 - len(tokens))])
    return run(_model(family), row)[0, len(tokens) - 1]

  return logits


def _naive(family, prompt):
  """Takes the argmax of a full forward pass per token."""
  tokens, log_probs, margins = list(prompt), [], []
  for _ in range(NEW):
    logits = _forward(family)(tokens)
    ordered = np.sort(logits)
    margins.append(ordered[-1] - ordered[-2])
    tokens.append(int(np.argmax(logits)))
    log_probs.append(jax.nn.log_softmax(logits)[tokens[-1]])
  assert min(margins) > 1e-4  # No tie that rounding would decide.
  return tokens[len(prompt):], jnp.stack(log_probs)


@each_family
def test_greedy_generation_is_the_argmax_of_full_forward_passes(family):
  """The prompts have different lengths."""
  results = _generator(family)(_requests())
  for prompt, result in zip(PROMPTS, results, strict=True):
    tokens, log_probs = _naive(family, prompt)
    assert result.ids == tokens and result.reason == "length"
    assert_trees_close(jnp.asarray(result.log_probs), log_probs)
  assert len({token for result in results for token in result.ids}) > 3


@each_family
def test_a_row_is_the_same_to_the_last_bit_in_every_batch(family):
  generate = _generator(family)
  requests = [
      dataclasses.replace(request, keep_state=True, seed=seed)
      for seed, request in enumerate(_requests(SAMPLINGS) + _requests(SAMPLINGS[::-1]))
  ]
  together = generate(requests)
  reversed_order = generate(requests[::-1])[::-1]
  for index, request in enumerate(requests):
    (alone,) = generate([request])
    for result in (together[index], reversed_order[index]):
      assert (result.ids, result.log_probs) == (alone.ids, alone.log_probs)
      for mine, other in zip(_leaves(result.prefix), _leaves(alone.prefix), strict=True):
        np.testing.assert_array_equal(mine, other)
  assert len({tuple(result.ids) for result in together}) == len(together)


def _leaves(prefix):
  return jax.tree.leaves((prefix.state, prefix.logits_V, prefix.seen_V, prefix.last_ids))


def test_seeds_reproduce():
  generate = _generator("mamba")
  first = _ids(generate(_requests(SAMPLINGS)))
  assert _ids(generate(_requests(SAMPLINGS))) == first
  assert _ids(generate(_requests(SAMPLINGS, seed=2**32 - 1))) != first
  # A longer continuation begins with the shorter one.
  longer = generate(_requests(SAMPLINGS, max_new_tokens=NEW + 5))
  assert [result.ids[:NEW] for result in longer] == first


def test_a_token_is_drawn_with_the_key_of_its_position():
  request = _requests([Sampling(0.5)] * 3, seed=7)[0]
  (result,) = _generator("mamba")([request])
  tokens = list(request.ids)
  for token in result.ids:
    key = jax.random.fold_in(jax.random.key(7), len(tokens))
    noise = jax.random.gumbel(key, (VOCAB,))
    assert token == int(jnp.argmax(_forward("mamba")(tokens) / 0.5 + noise))
    tokens.append(token)


def test_a_repetition_penalty_counts_prompt_and_continuation():
  request = Request([3, 1, 4], Sampling(0, repetition_penalty=3.0), max_new_tokens=NEW)
  (result,), (plain,) = (_generator("mamba")([each]) for each in (request, _requests()[0]))
  assert result.ids != plain.ids
  tokens = [3, 1, 4]
  for token, log_prob in zip(result.ids, result.log_probs, strict=True):
    logits = np.array(_forward("mamba")(tokens))
    expected = float(jax.nn.log_softmax(logits)[token])  # Without the penalty.
    seen = np.isin(np.arange(VOCAB), tokens)
    logits[seen] = np.where(logits > 0, logits / 3, logits * 3)[seen]
    assert token == np.argmax(logits) and log_prob == pytest.approx(expected, abs=1e-4)
    tokens.append(token)


def test_stop_ids_end_a_continuation_without_being_part_of_it():
  generate = _generator("mamba")
  full = _ids(generate(_requests()))
  assert _ids(generate(_requests(max_new_tokens=1))) == [row[:1] for row in full]
  stop = full[0][3]
  results = generate(_requests(stop_ids=[stop]))
  assert _ids(results) == [row[: row.index(stop)] if stop in row else row for row in full]
  assert [result.reason for result in results] == [
      "stop" if stop in row else "length" for row in full
  ]


def test_stop_strings_end_a_text_across_tokens():
  """Letters spells tokens with several characters; here a stop string begins inside of one."""
  generate, letters = _generator("mamba"), Letters()
  (full,) = generate(_requests()[2:])
  assert full.text == letters.decode(full.ids)
  for start in range(1, len(full.text) - 3):
    stop = full.text[start : start + 3]
    request = dataclasses.replace(_requests()[2], stop_strings=["not in it", stop])
    (result,) = generate([request])
    place = full.text.index(stop)
    assert result.text == full.text[:place] and result.reason == "stop"
    # Up to the token that completes it.
    assert result.ids == full.ids[: len(result.ids)]
    assert stop in letters.decode(result.ids) and stop not in letters.decode(result.ids[:-1])


def test_the_kept_state_is_that_after_the_returned_ids():
  """The batch reads on after a row has ended, in the middle of a block."""
  generate = _generator("mamba")
  full = generate(_requests())
  kept = [
      dataclasses.replace(_requests()[0], keep_state=True, max_new_tokens=5),
      dataclasses.replace(_requests()[1], keep_state=True, stop_ids=[full[1].ids[9]]),
      dataclasses.replace(_requests()[2], keep_state=True, stop_strings=[full[2].text[4:9]]),
  ]
  for before, result in zip(_requests(), generate(kept), strict=True):
    whole = generate.read([*before.ids, *result.ids])
    assert_trees_close(_leaves(result.prefix), _leaves(whole))
    rest = Request((), GREEDY, NEW - len(result.ids), prefix=result.prefix)
    (after,), (unbroken,) = generate([rest]), generate([before])
    assert result.ids + after.ids == unbroken.ids
    assert result.log_probs + after.log_probs == unbroken.log_probs


def test_a_prefix_is_read_once_for_many():
  generate = _generator("gau_retnet")
  prefix = generate.read(PROMPTS[2])
  shared = generate([Request((), sampling, NEW, prefix=prefix) for sampling in SAMPLINGS])
  apart = generate([Request(PROMPTS[2], sampling, NEW) for sampling in SAMPLINGS])
  assert shared == apart
  # Read in two parts, other chunks are rounded in another way.
  half = generate.read(PROMPTS[2][:11])
  assert_trees_close(_leaves(generate.read(PROMPTS[2][11:], half)), _leaves(prefix))


def test_pieces_join_to_the_results():
  generate = _generator("mamba")
  requests = _requests(SAMPLINGS, stop_strings=["ef"])
  results = generate(requests)
  for block in (1, 3, 8):
    texts, ended = ["", "", ""], {}
    for piece in generate.stream(requests, block=block):
      assert piece.index not in ended
      texts[piece.index] += piece.text
      if piece.result:
        ended[piece.index] = piece.result
    assert [ended[index] for index in range(3)] == results
    assert texts == [result.text for result in results]


def test_an_interrupted_continuation_goes_on_as_if_it_had_not_been():
  generate = _generator("mamba")
  (request, *_) = _requests(SAMPLINGS)
  (whole,) = generate([request])
  asked = iter([False, False, True])
  *_, last = generate.stream(
      [dataclasses.replace(request, keep_state=True)], block=3, stop=lambda: next(asked)
  )
  assert last.result.reason == "interrupted" and len(last.result.ids) == 6
  rest = dataclasses.replace(
      request, ids=(), prefix=last.result.prefix, max_new_tokens=NEW - 6
  )
  assert last.result.ids + generate([rest])[0].ids == whole.ids


def test_what_was_not_read_before_an_interruption_stays_unread(monkeypatch):
  generate, read = _generator("mamba"), []
  once = generate.programs.read
  monkeypatch.setattr(generate.programs, "read", lambda *given: read.append(given) or once(*given))
  requests = [Request(PROMPTS[0], max_new_tokens=NEW, keep_state=True) for _ in range(20)]
  results = {piece.index: piece.result for piece in generate.stream(requests, stop=lambda: True)}
  assert len(read) == 1 and list(results) == list(range(20))
  assert {result.reason for result in results.values()} == {"interrupted"}
  assert results[0].prefix is not None and results[19].prefix is None


def test_nothing_is_drawn_for_no_new_tokens():
  (result,) = _generator("mamba")([Request(PROMPTS[0], max_new_tokens=0, keep_state=True)])
  assert (result.ids, result.text, result.reason) == ([], "", "length")
  whole = _generator("mamba").read(PROMPTS[0])
  for mine, other in zip(_leaves(result.prefix), _leaves(whole), strict=True):
    np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(("values", "message"), [
    ({"ids": []}, "prompt"), ({"ids": [VOCAB]}, "a token of prompt = 11"),
    ({"ids": [1, -1]}, "a token of prompt = -1"), ({"stop_ids": [99]}, "a token of stop_ids = 99"),
    ({"max_new_tokens": -1}, "max_new_tokens"), ({"max_new_tokens": 2**31}, "from 0 to 2147483647"),
    ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"),
    ({"stop_strings": ["a", ""]}, "stop_strings"),
])
def test_an_invalid_request_is_named_before_anything_is_read(values, message):
  good = Request([1])
  with pytest.raises(InputError, match=message):
    _generator("mamba").stream([good, dataclasses.replace(good, **values)])


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 1), (2, 4), (4, 4), (5, 8)])
def test_rows_are_one_or_a_multiple_of_four(batch_size, rows):
  assert Generator(_model("mamba"), batch_size=batch_size).programs.batch_size == rows


def test_no_request_no_rows_and_no_tokenizer():
  with pytest.raises(InputError, match="prompts"):
    _generator("mamba")([])
  for block in (0, 65):
    with pytest.raises(InputError, match=f"block = {block} .* from 1 to"):
      _generator("mamba").stream([Request([1])], block=block)
  with pytest.raises(InputError, match="batch_size = 0"):
    Generator(_model("mamba"), batch_size=0)
  with pytest.raises(InputError, match="stop_strings"):
    Generator(_model("mamba"))([Request([1], stop_strings=["a"])])


@with_kinds([kind for kind in KINDS if kind[1] != 1])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_state_has_the_same_size_after_any_prompt(kind, state_dtype):
  """The state that decoding carries does not grow with the tokens that were read."""
  family, depth, inject = kind
  config = model_config(family, depth, inject, layers=4, state_dtype=state_dtype)
  model = unrolled(random_model(config))

  def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

  fresh = jax.eval_shape(lambda: model.init_state(2))
  kept = {str(leaf.dtype) for leaf in jax.tree.leaves(fresh.layers)}
  assert ("bfloat16" in kept) == (state_dtype == "bfloat16" and family != "transformer")
  for time in (1, 40):
    tokens = jnp.zeros((2, time), jnp.int32)
    after, _ = jax.eval_shape(model.prefill, tokens)
    stepped, _ = jax.eval_shape(model.step, after, tokens[:, 0])
    assert shapes(after) == shapes(stepped) == shapes(fresh)


def test_two_programs_read_and_one_decodes_texts_of_all_lengths():
  """They take the same memory for a text of any length, and requests of any settings."""
  generate = Generator(_model("mamba"), batch_size=ROWS)
  for length in (1, 4, 5, 16, 21, 200):
    generate([Request([1] * length, sampling, 1) for sampling in SAMPLINGS])
  assert generate.programs._read._cache_size() == len(programs.CHUNKS)
  assert generate.programs._decode._cache_size() == 1
