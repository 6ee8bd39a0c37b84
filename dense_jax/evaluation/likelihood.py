"""Log-likelihoods of continuations given contexts, and of whole documents.

The definitions are those of lm-evaluation-harness 0.4.13. A continuation's score is the sum of the
log-probabilities of its tokens in nats, each given the context and the tokens before it, computed
in float32 and added in float64; it is greedy if each token is the most probable one.

A prefix that several requests share is read once, and they go on from copies of the state after it
(`dense_jax.evaluation.prefixes`). Rows are padded on the right to a few lengths, and a row longer
than the last of these is read in several calls with its state carried, in constant memory. So a
score does not depend on the batch size or on the order of the requests, except for rounding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from dense_jax import distributed
from dense_jax.batch import Batch, Segments
from dense_jax.config import ModelConfig
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.errors import InputError
from dense_jax.evaluation.prefixes import Edge, build_tree
from dense_jax.evaluation.reading import (
    LENGTHS,
    TARGETS,
    WORTH_A_PROGRAM,
    Programs,
    choose_lengths,
    programs_of,
)
from dense_jax.models.language_model import LanguageModel, ModelState
from dense_jax.types import Array, Params

# Batches that run on the devices before the results of the first are waited for.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Request:
  """A continuation to score.

  Attributes:
    context_ids: the tokens before it, at least one.
    target_ids: its tokens. The score of none is 0, and greedy.
  """

  context_ids: tuple[int, ...]
  target_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scored:
  """The score of a request.

  Attributes:
    log_likelihood: in nats.
    greedy: whether each of its tokens is the most probable one.
  """

  log_likelihood: float
  greedy: bool


OnDone = Callable[[Mapping[int, Scored]], None]
"""Called with the scores that have become known, by the requests' indices."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
  """Tokenizes a context and its continuation; see `encode_pairs`."""
  return encode_pairs(tokenizer, [(context, continuation)])[0]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
  """Tokenizes contexts and their continuations as the harness does.

  White space at the end of a context moves to the continuation. Both are encoded as one text, and
  the continuation's tokens are those after as many as the context alone has. bos goes before them
  if the tokenizer adds it, and is itself the context if the text before the continuation is empty.
  """
  moved = []
  for context, continuation in pairs:
    stripped = context.rstrip()
    moved.append((stripped, context[len(stripped):] + continuation))
  texts = dict.fromkeys(text for context, continuation in moved
                        for text in (context, context + continuation))
  encoded = dict(zip(texts, tokenizer.encode_batch([*texts]), strict=True))
  bos = tokenizer.bos_id

  def request(context: str, continuation: str) -> Request:
    before, whole = encoded[context], encoded[context + continuation]
    # A text may spell bos itself.
    added = (tokenizer.add_bos or not before) and whole[:1] != [bos]
    before, whole = [bos] * added + before, [bos] * added + whole
    # Not the first tokens of `whole`: a token of it can span the border.
    return Request(tuple(before or whole[:1]), tuple(whole[len(before) or 1 :]))

  return [request(*pair) for pair in moved]


class Likelihood:
  """Scores requests with a model, on the mesh of its parameters.

  Example:
    likelihood = Likelihood(run.model, run.params, run.tokenizer, window=1024)
    request = encode_pair(run.tokenizer, "The sky is", " blue")
    [scored] = likelihood.score([request])
  """

  def __init__(
      self, model: LanguageModel, params: Params, tokenizer: Tokenizer, *, window: int,
      batch_size: int = 16, carried: bool = True, share: bool = True,
      put: Callable[[Batch], Batch] | None = None, rows: slice = slice(None),
  ) -> None:
    """Stores what is needed; nothing is compiled yet.

    Models of the same configuration share their programs, so that another instance compiles nothing
    anew.

    Args:
      model: the model, which may be abstract.
      params: its parameters.
      tokenizer: its tokenizer, whose bos is before a document.
      window: tokens that the model reads at most if no state is carried, such as the length of its
        rows in training.
      batch_size: rows of a batch.
      carried: whether a context, or a document, of any length is read from its beginning, with the
        state carried over all of it (attention carries its cache, which holds the last tokens).
        Otherwise only the last `window` tokens before the last target are read.
      share: whether prefixes that requests share are read once.
      put: places a host batch on the mesh, as `Snapshot.put` does. All batches then have
        `batch_size` rows. None means one device.
      rows: the rows of a batch that `put` takes in this process.
    """
    self.tokenizer, self.params = tokenizer, params
    self.window, self.carried, self.batch_size = window, carried, batch_size
    self._config: ModelConfig = model.config
    self._share, self._put, self._rows = share, put, rows

  @property
  def context(self) -> str:
    """A few words on what a context longer than the window is to the model."""
    return "carried" if self.carried else f"fresh, at most {self.window:,} tokens"

  def score(self, requests: Sequence[Request], on_done: OnDone | None = None) -> list[Scored]:
    """Scores requests; returns their scores in the same order.

    Args:
      requests: the requests.
      on_done: called after each batch with the scores that have become known.

    Raises:
      InputError: a continuation does not fit the window, and no state is carried.
    """
    return _Scoring(self, requests, on_done).run()

  def rolling(self, ids: Sequence[int]) -> float:
    """Returns the log-likelihood in nats of a whole document, given bos before it."""
    return sum(scored.log_likelihood for scored in self.score(self.windows(ids)))

  def windows(self, ids: Sequence[int]) -> list[Request]:
    """Returns the requests whose scores add up to that of a whole document.

    If a state is carried, this is one request: the document after bos. Otherwise these are the
    harness's rolling windows with one token of context: of `window` targets each, where the first
    token read is the last target of the window before (bos at first), and where the last window
    reads `window` tokens though fewer of them are targets yet to score.
    """
    ids, window = tuple(ids), self.window
    bos = (self.tokenizer.bos_id,)
    if self.carried or len(ids) <= window:
      return [Request(bos, ids)] if ids else []
    requests = [Request(bos, ids[:window])]
    for done in range(window, len(ids), window):
      end = min(done + window, len(ids))
      requests.append(Request(ids[end - window - 1 : done], ids[done:end]))
    return requests

  def is_cut(self, request: Request) -> bool:
    """Returns whether the beginning of a request's context is not read."""
    length = len(request.context_ids) + len(request.target_ids)
    return not self.carried and length > self.window + 1

  def programs(self, longest: int) -> Programs:
    """Returns the programs for sequences of at most `longest` tokens.

    A cache of attention is only as long as they need.
    """
    context = getattr(self._config.mixer, "context", 0)
    context = min(context, max(16, 1 << (longest - 1).bit_length()))
    if not context:
      return programs_of(self._config)
    mixer = dataclasses.replace(self._config.mixer, context=context)
    return programs_of(dataclasses.replace(self._config, mixer=mixer))

  def num_rows(self, length: int, needed: int) -> int:
    """Returns the rows of a batch for at most `needed` rows of a padded length."""
    most = self.batch_size
    if self._put is not None or most * length <= 2 * WORTH_A_PROGRAM:
      return most
    return next(size for size in (1, -(-most // 4), most) if size >= min(needed, most))

  def place(self, batch: Batch) -> Batch:
    """Puts a host batch on the devices."""
    if self._put is None:
      placed = next(iter(self.params.values())).sharding
      return jax.device_put(batch, placed)
    return self._put(jax.tree.map(lambda x: x[self._rows], batch))


class _Scoring:
  """One call of `Likelihood.score`: its tree of prefixes, and the sums so far."""

  def __init__(
      self, likelihood: Likelihood, requests: Sequence[Request], on_done: OnDone | None
  ) -> None:
    self._likelihood, self._on_done = likelihood, on_done
    self._nats = np.zeros(len(requests))
    self._greedy = np.ones(len(requests), bool)
    self._left = np.array([len(request.target_ids) for request in requests], int)
    self._numbers = [i for i, request in enumerate(requests) if request.target_ids]
    inputs, targets = [], []
    for number in self._numbers:
      request = requests[number]
      if not request.context_ids:
        raise ValueError(f"request {number} has no context: expected at least one token (bos)")
      if likelihood.is_cut(request) and len(request.target_ids) > likelihood.window:
        raise InputError(
            f"a continuation of {len(request.target_ids):,} tokens does not fit the window of "
            f"{likelihood.window:,}: expected a shorter one, or a carried context"
        )
      read = np.asarray((*request.context_ids, *request.target_ids[:-1]), np.int32)
      inputs.append(read if likelihood.carried else read[-likelihood.window :])
      targets.append(np.asarray(request.target_ids, np.int32))
    self._roots = build_tree(inputs, targets, share=likelihood._share)
    self._programs = likelihood.programs(max(map(len, inputs), default=1))
    self._lengths = {
        fresh: choose_lengths(lengths) for fresh, lengths in _lengths(self._roots).items()
    }
    self._pending: list[tuple[list[tuple[int, int]], list[tuple[Array, Array]]]] = []

  def run(self) -> list[Scored]:
    """Reads the tree; returns the scores of all requests."""
    empty = np.flatnonzero(self._left == 0)
    self._tell(empty)
    self._read_level([(edge, 0) for edge in self._roots], None)
    self._resolve(0)
    return [self._scored(number) for number in range(len(self._left))]

  def _scored(self, number: int) -> Scored:
    return Scored(float(self._nats[number]), bool(self._greedy[number]))

  def _read_level(self, edges: list[tuple[Edge, int]], state: ModelState | None) -> None:
    """Reads edges, each from a row of `state`, and all that is below them."""
    inner = [pair for pair in edges if pair[0].children]
    for group in self._batches(inner):
      after, rows = self._read_batch(group, state, keep=True)
      below = [(child, row) for (edge, _), row in zip(group, rows, strict=True)
               for child in edge.children]
      self._read_level(below, after)
    for group in self._batches([pair for pair in edges if not pair[0].children]):
      self._read_batch(group, state, keep=False)

  def _batches(self, edges: list[tuple[Edge, int]]) -> Iterator[list[tuple[Edge, int]]]:
    """Yields edges of nearly equal lengths, the longest first."""
    edges = sorted(edges, key=lambda pair: -len(pair[0].tokens))
    while edges:
      length = self._padded(edges[0][0].start, len(edges[0][0].tokens))
      rows = self._likelihood.num_rows(length, len(edges))
      yield edges[:rows]
      edges = edges[rows:]

  def _padded(self, start: int, longest: int) -> int:
    """Returns the length to which rows are padded that begin at a position."""
    lengths = self._lengths[start == 0]
    return next((length for length in lengths if length >= longest), lengths[-1])

  def _read_batch(
      self, group: list[tuple[Edge, int]], state: ModelState | None, *, keep: bool
  ) -> tuple[ModelState | None, list[int]]:
    """Reads a batch of edges; returns the state after them, and each one's row in it."""
    edges, rows = [edge for edge, _ in group], [row for _, row in group]
    done, longest = 0, max(len(edge.tokens) for edge in edges)
    while done < longest:
      length = self._padded(edges[0].start + done, longest - done)
      batch_size = self._likelihood.num_rows(length, len(edges))
      goes_on = keep or done + length < longest
      index_B = np.zeros(batch_size, np.int32)
      index_B[: len(rows)] = rows
      batch = self._likelihood.place(_host_batch(edges, done, length, batch_size))
      hidden_BTD, state = self._programs.read(
          self._likelihood.params, state, index_B, batch, keep=goes_on
      )
      self._score_targets(edges, done, length, hidden_BTD)
      done += length
      rows = list(range(len(edges)))
      if not keep:  # What has come to its end makes room.
        rows = [row for row in rows if len(edges[row].tokens) > done]
        edges = [edges[row] for row in rows]
    return state, rows

  def _score_targets(
      self, edges: Sequence[Edge], done: int, length: int, hidden_BTD: Array
  ) -> None:
    """Scores the targets that are predicted by tokens `done` to `done + length` of the edges."""
    owners: list[tuple[int, int]] = []  # Requests, and how many of their targets follow.
    places: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for row, edge in enumerate(edges):
      begin = edge.start + done
      for span in edge.spans:
        first = max(span.place, begin)
        stop = min(span.place + len(span.targets), begin + length)
        if first < stop:
          owners.append((span.sequence, stop - first))
          places.append(row * length + np.arange(first - begin, stop - begin))
          targets.append(span.targets[first - span.place : stop - span.place])
    if not owners:
      return
    place_K, target_K = np.concatenate(places), np.concatenate(targets)
    parts = [slice(start, start + TARGETS) for start in range(0, len(place_K), TARGETS)]
    self._pending.append((owners, [
        self._programs.score(self._likelihood.params, hidden_BTD, place_K[part], target_K[part])
        for part in parts
    ]))
    self._resolve(_IN_FLIGHT)

  def _resolve(self, leave: int) -> None:
    """Waits for all results but the newest `leave`, and adds them to the requests' sums."""
    while len(self._pending) > leave:
      owners, scored = self._pending.pop(0)
      parts = distributed.to_host(scored)
      log_p, greedy = (np.concatenate(values) for values in zip(*parts, strict=True))
      begin, complete = 0, []
      for sequence, count in owners:
        number, part = self._numbers[sequence], slice(begin, begin + count)
        self._nats[number] += log_p[part].astype(np.float64).sum()
        self._greedy[number] &= bool(greedy[part].all())
        self._left[number] -= count
        begin += count
        if not self._left[number]:
          complete.append(number)
      self._tell(complete)

  def _tell(self, numbers: Sequence[int] | np.ndarray) -> None:
    if self._on_done is not None and len(numbers):
      self._on_done({int(number): self._scored(int(number)) for number in numbers})


def _lengths(roots: Sequence[Edge]) -> dict[bool, list[int]]:
  """Returns the lengths of all calls' rows: of those that begin a document, and of the others."""
  lengths: dict[bool, list[int]] = {True: [], False: []}
  edges = list(roots)
  while edges:
    edge = edges.pop()
    for done in range(0, len(edge.tokens), LENGTHS[-1]):
      lengths[edge.start + done == 0].append(min(len(edge.tokens) - done, LENGTHS[-1]))
    edges += edge.children
  return lengths


def _host_batch(edges: Sequence[Edge], done: int, length: int, batch_size: int) -> Batch:
  """Makes the batch of tokens `done` to `done + length` of edges, padded on the right."""
  tokens_BT = np.zeros((batch_size, length), np.int32)
  ids_BT, positions_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
  for row, edge in enumerate(edges):
    part = edge.tokens[done : done + length]
    tokens_BT[row, : len(part)] = part
    ids_BT[row, : len(part)] = 1
    positions_BT[row] = edge.start + done + np.arange(length)
  return Batch(tokens_BT, tokens_BT, ids_BT != 0, Segments(positions_BT, ids_BT))  # type: ignore[arg-type]
