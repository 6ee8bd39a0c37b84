"""Documents and split points drawn at random change nothing.

There is one compiled program per family, because layouts and splits are data, not shapes.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_jax.batch import Segments
from dense_jax.models.language_model import ModelState
from tests.builders import (
    each_family,
    fast_jit,
    model_config,
    random_model,
    random_tokens,
)
from tests.helpers import assert_trees_close

T = 13


@functools.cache
def _model(family):
  # As in the matrix of equalities: the norm of retention's heads shall not multiply rounding.
  depth = 0 if family == "transformer" else 2
  return random_model(model_config(family, depth, norm_eps=1.0))


@functools.cache
def _program(family):
  """Makes (tokens [2, T], segments, state) -> (logits, state after)."""

  @fast_jit
  def run(model, tokens, segments, state):
    hidden, after = model.hidden(tokens, segments, state)
    return model.logits(hidden), after

  return functools.partial(run, _model(family))


def _segments(rows, first=0):
  """Makes segments of [(offset of the first position, document lengths)], padded to T."""
  positions, ids = np.zeros((2, len(rows), T), np.int32)
  for index, lengths in enumerate(rows):
    begin = 0
    for number, length in enumerate(lengths):
      offset = first if not number else 0
      positions[index, begin : begin + length] = offset + np.arange(length)
      ids[index, begin : begin + length] = number + 1
      begin += length
  return Segments(jnp.asarray(positions), jnp.asarray(ids))


@st.composite
def _layouts(draw):
  """Draws the lengths of a row's documents: at least one token, at most T."""
  total = draw(st.integers(1, T))
  cuts = draw(st.sets(st.integers(1, total - 1))) if total > 1 else set()
  edges = [0, *sorted(cuts), total]
  return [end - begin for begin, end in itertools.pairwise(edges)]


properties = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@each_family
@properties
@given(layout=_layouts(), seed=st.integers(0, 2**16))
def test_packed_documents_are_the_documents_apart(family, layout, seed):
  run, tokens = _program(family), random_tokens(seed, 1, T)
  fresh = _model(family).init_state(2)
  packed, after = run(jnp.repeat(tokens, 2, axis=0), _segments([layout, layout]), fresh)
  begin = 0
  for length in layout:
    alone = jnp.roll(tokens, -begin, axis=1)
    logits, alone_after = run(jnp.repeat(alone, 2, axis=0), _segments([[length]] * 2), fresh)
    assert_trees_close(packed[:, begin : begin + length], logits[:, :length])
    begin += length
  assert_trees_close(after, alone_after)  # The last document's.


@each_family
@properties
@given(layout=_layouts(), split=st.integers(0, T), seed=st.integers(0, 2**16))
def test_a_row_in_two_parts_is_the_row(family, layout, split, seed):
  run, tokens = _program(family), jnp.repeat(random_tokens(seed, 1, T), 2, axis=0)
  fresh = _model(family).init_state(2)
  split = min(split, sum(layout))
  whole, after = run(tokens, _segments([layout] * 2), fresh)

  parts, begin = ([], []), 0
  first = 0  # The position at which the second part begins.
  for length in layout:
    before = min(max(split - begin, 0), length)
    if before:
      parts[0].append(before)
    if before < length:
      if not parts[1]:
        first = before
      parts[1].append(length - before)
    begin += length
  logits_1, between = run(tokens, _segments([parts[0]] * 2), fresh)
  second = _segments([parts[1]] * 2, first)
  logits_2, end = run(jnp.roll(tokens, -split, axis=1), second, between)
  total = sum(layout)
  logits = jnp.concatenate([logits_1[:, :split], logits_2[:, : total - split]], axis=1)
  assert_trees_close(logits, whole[:, :total])
  assert isinstance(end, ModelState)
  assert_trees_close(end, after)
