"""Log-likelihoods: those of whole sequences, whatever shares a batch or a prefix with them."""

import dataclasses

import jax
import numpy as np
import pytest

from dense_jax import sharding
from dense_jax.batch import Batch
from dense_jax.config import MeshConfig
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from dense_jax.evaluation.likelihood import Likelihood, Request, encode_pair, encode_pairs
from dense_jax.evaluation.prefixes import build_tree
from dense_jax.evaluation.reading import LENGTHS, choose_lengths, programs_of
from dense_jax.models.params import get_params, logical_axes
from dense_jax.ops import resolver
from tests.builders import (
    FAMILIES,
    STATE_FAMILIES,
    VOCAB,
    model_config,
    random_model,
)

RNG = np.random.default_rng(3)
BYTES = ByteTokenizer()
CLOSE = 1e-5


def ids(length):
  return tuple(int(token) for token in RNG.integers(0, VOCAB, length))


def questions(count, *, shots=0, context=20, options=3, target=6):
  """Requests of questions with options, after one few-shot prompt."""
  prompt = ids(shots)
  return [
      Request(question, ids(int(RNG.integers(1, target + 1))))
      for question in [prompt + ids(int(RNG.integers(9, context))) for _ in range(count)]
      for _ in range(options)
  ]


def reference(model, requests):
  """Scores each request by a forward pass over nothing but itself and padding on its right."""
  length = max(len(request.context_ids) + len(request.target_ids) for request in requests)
  log_p = jax.jit(lambda tokens_BT: jax.nn.log_softmax(model(tokens_BT)))
  scores, greedy = [], []
  for request in requests:
    tokens = np.array([*request.context_ids, *request.target_ids])
    values = np.asarray(log_p(np.pad(tokens, (0, length - len(tokens)))[None]))[0]
    values = values[len(request.context_ids) - 1 :][: len(request.target_ids)]
    scores.append(float(values[np.arange(len(values)), request.target_ids].sum(dtype=np.float64)))
    greedy.append(bool((values.argmax(-1) == request.target_ids).all()))
  return np.array(scores), greedy


def make(model, **options):
  return Likelihood(model, get_params(model), BYTES, **({"window": 512} | options))


def values(scored):
  return np.array([score.log_likelihood for score in scored])


def check_all(model, requests, batch_sizes):
  """Asserts that scores are the reference's, for any batch size, order, and sharing."""
  expected, greedy = reference(model, requests)
  order = RNG.permutation(len(requests))
  first = None
  for batch_size in batch_sizes:
    scored = make(model, batch_size=batch_size).score(requests)
    np.testing.assert_allclose(values(scored), expected, rtol=1e-6, atol=CLOSE)
    assert [score.greedy for score in scored] == greedy
    first = first if first is not None else values(scored)
    # Of long documents, less than float32 can tell apart.
    np.testing.assert_allclose(values(scored), first, rtol=3e-8, atol=CLOSE)
  likelihood = make(model, batch_size=batch_sizes[0])
  shuffled = likelihood.score([requests[index] for index in order])
  np.testing.assert_array_equal(values(shuffled), first[order])
  np.testing.assert_allclose(
      values(make(model, batch_size=batch_sizes[0], share=False).score(requests)), first,
      rtol=3e-8, atol=CLOSE,
  )


@pytest.mark.slow
def test_a_score_depends_on_its_request_alone():
  requests = [*questions(5), Request(ids(1), ids(3)), Request(ids(2), ())]
  requests.append(requests[2])
  check_all(random_model(model_config("mamba", 2)), requests, [2, 5])


@pytest.mark.parametrize(("family", "depth"), [
    pytest.param(family, depth, marks=(
        pytest.mark.slow if family == "transformer" else pytest.mark.exhaustive))
    for depth, families in ((0, FAMILIES), (2, STATE_FAMILIES)) for family in families
])
def test_a_score_depends_on_its_request_alone_in_every_family(family, depth):
  requests = [*questions(6, shots=30, options=3), Request(ids(4), ids(700))]
  requests += [Request(ids(20), ids(10)) for _ in range(9)]
  check_all(random_model(model_config(family, depth)), requests, [1, 16])


def test_a_context_that_no_state_carries_is_cut_on_the_left():
  model = random_model(model_config("gau_retnet"))
  long = [Request(ids(30), ids(4)) for _ in range(3)]
  # The harness keeps window + 1 tokens, of which it reads all but the last.
  cut = [Request(request.context_ids[-9:], request.target_ids) for request in long]
  fresh, carried = make(model, window=12, carried=False), make(model, window=12)
  assert [fresh.is_cut(request) for request in (*long, *cut)] == [True] * 3 + [False] * 3
  assert not carried.is_cut(long[0])
  np.testing.assert_allclose(
      values(fresh.score(long)), values(carried.score(cut)), rtol=0, atol=CLOSE)
  assert abs(values(fresh.score(long)) - values(carried.score(long))).min() > 1e-3
  assert (fresh.context, carried.context) == ("fresh, at most 12 tokens", "carried")
  with pytest.raises(InputError, match="of 13 tokens does not fit the window of 12"):
    fresh.score([Request(ids(1), ids(13))])
  with pytest.raises(ValueError, match="request 0 has no context"):
    fresh.score([Request((), ids(13))])


@pytest.mark.slow
def test_windows_of_a_document():
  model = random_model(model_config("gau_retnet", vocab_size=258))
  fresh, carried = make(model, window=4, carried=False), make(model, window=4)
  document = tuple(range(10))
  assert carried.windows(document) == [Request((256,), document)]
  assert fresh.windows(document) == [
      Request((256,), (0, 1, 2, 3)), Request((3,), (4, 5, 6, 7)),
      # The last window reads four tokens, 5 to 8, for its two targets.
      Request((5, 6, 7), (8, 9)),
  ]
  assert fresh.windows(document[:4]) == [Request((256,), document[:4])]
  assert fresh.windows(()) == carried.windows(()) == []
  whole, _ = reference(model, carried.windows(document))
  assert carried.rolling(document) == pytest.approx(whole[0], abs=CLOSE)
  parts, _ = reference(model, fresh.windows(document))
  assert fresh.rolling(document) == pytest.approx(parts.sum(), abs=CLOSE)
  assert carried.rolling(()) == 0


class Words(ByteTokenizer):
  """Pairs of bytes are tokens, and bos is added only where asked."""

  add_bos = False

  def encode_batch(self, texts):
    return [[hash(text[i : i + 2]) % 250 for i in range(0, len(text), 2)] for text in texts]


def test_the_border_of_context_and_continuation():
  pair = encode_pair(BYTES, "ab  ", "c")
  assert pair == Request((256, 97, 98), (32, 32, 99))
  assert encode_pair(BYTES, "", "c") == encode_pair(BYTES, "", "c") == Request((256,), (99,))
  assert encode_pair(BYTES, " \n", "c") == Request((256,), (32, 10, 99))
  words = Words()

  def tokens(text):
    return tuple(words.encode_batch([text])[0])

  # A token that spans the border is nobody's: both have the tokens of their own texts.
  assert encode_pair(words, "abc", "def") == Request(tokens("abc"), tokens("abcdef")[2:])
  assert encode_pair(words, "ab", "cd") == Request(tokens("ab"), tokens("cd"))
  assert encode_pair(words, " ", "cd") == Request((256,), tokens(" cd"))
  assert encode_pairs(words, [("ab", "cd"), ("", "ab")]) == [
      Request(tokens("ab"), tokens("cd")), Request((256,), tokens("ab"))]


def test_the_tree_reads_a_shared_prefix_once():
  shots, first, second = (np.array(ids(length), np.int32) for length in (40, 30, 30))
  first[0], second[0] = 1, 2
  options = [np.array(option, np.int32) for option in ([1, 2], [3], [3, 4, 5])]
  inputs = [np.concatenate([shots, question, option[:-1]])
            for question in (first, second) for option in options]
  targets = options * 2
  [root] = build_tree(inputs, targets)
  np.testing.assert_array_equal(root.tokens, shots)
  assert (root.start, root.spans, len(root.children)) == (0, [], 2)
  for question in root.children:
    assert (question.start, len(question.tokens)) == (40, 30)
    # The first token of each option, and all of an option of one token.
    assert sorted(span.targets.tolist() for span in question.spans) == [[1], [3], [3]]
    assert sorted(edge.tokens.tolist() for edge in question.children) == [[1], [3, 4]]
    assert all(edge.start == 70 and not edge.children for edge in question.children)
  assert sum(len(edge.tokens) for edge in build_tree(inputs, targets, share=False)) == sum(
      map(len, inputs))
  assert build_tree([], []) == []


def test_the_tree_of_random_sequences_has_every_target_once():
  for _ in range(20):
    inputs = [np.array(RNG.integers(0, 2, RNG.integers(1, 40)), np.int32) for _ in range(30)]
    targets = [np.array(ids(int(RNG.integers(1, len(tokens) + 1))), np.int32) for tokens in inputs]
    found = {number: {} for number in range(len(inputs))}
    edges = [(edge, ()) for edge in build_tree(inputs, targets)]
    while edges:
      edge, before = edges.pop()
      assert edge.start == len(before) and len(edge.tokens)
      tokens = (*before, *edge.tokens.tolist())
      for span in edge.spans:
        assert tokens[: span.place + 1] == tuple(inputs[span.sequence][: span.place + 1].tolist())
        places = range(span.place, span.place + len(span.targets))
        assert span.place >= edge.start and places[-1] < len(tokens)
        found[span.sequence].update(zip(places, span.targets.tolist(), strict=True))
      edges += [(child, tokens) for child in edge.children]
    for number, (tokens, wanted) in enumerate(zip(inputs, targets, strict=True)):
      places = range(len(tokens) - len(wanted), len(tokens))
      assert found[number] == dict(zip(places, wanted.tolist(), strict=True))


def test_few_rows_are_padded_to_one_length_and_many_to_several():
  assert choose_lengths([]) == ()
  assert choose_lengths([3, 9, 60]) == (64,)
  assert choose_lengths([3] * 20 + [60] * 20) == (8, 64)
  assert choose_lengths([512, 1]) == (512,)
  assert set(choose_lengths(list(range(1, 513)) * 100)) == set(LENGTHS)


def test_scores_are_told_as_soon_as_they_are_known():
  model = random_model(model_config("gau_retnet"))
  requests = questions(4)
  told: dict = {}
  scored = make(model, batch_size=2).score(requests, told.update)
  assert [told[number] for number in range(len(requests))] == scored


@pytest.mark.slow
@pytest.mark.parametrize("family", [
    "mamba", *(pytest.param(name, marks=pytest.mark.exhaustive)
               for name in ("mamba2", "transformer")),
])
@pytest.mark.parametrize("axes", [
    {"data": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"data": 4, "sequence": 2}, marks=pytest.mark.exhaustive),
])
def test_scores_on_a_mesh(family, axes):
  """The mesh of training, with its placement of batches."""
  model = random_model(model_config(family, width=32, vocab_size=12, heads=4, kv_heads=4,
                                    ffn_width=32)
                       if family == "transformer" else
                       model_config(family, width=32, vocab_size=12, **(
                           {"groups": 2} if family == "mamba2" else {})))
  mesh = sharding.make_mesh(dataclasses.replace(MeshConfig(data=1), **axes))
  params = get_params(model)
  placed = sharding.param_shardings(
      logical_axes(model), {name: leaf.shape for name, leaf in params.items()}, mesh)
  rows = sharding.batch_sharding(mesh)

  def put(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: sharding.put_rows(x, slice(0, 8), 8, rows), batch)

  requests = [*questions(5, shots=20), Request(ids(3), ids(600))]
  likelihood = Likelihood(
      model, jax.device_put(params, placed), BYTES, window=64, batch_size=8, put=put)
  np.testing.assert_allclose(
      values(likelihood.score(requests)), values(make(model).score(requests)), rtol=1e-6,
      atol=1e-4)


def test_programs_are_those_of_the_form_that_runs_now(monkeypatch):
  config = model_config("mamba2")
  monkeypatch.setattr(resolver, "_REFUSED", set())
  before = programs_of(config)
  with resolver.compiling_for("tpu"):
    kernels = programs_of(config)
    resolver.refuse_kernels("matrix")
    refused = programs_of(config)
  resolver._choose.cache_clear()
  assert kernels is not before and refused is not kernels
  assert programs_of(config) is before
