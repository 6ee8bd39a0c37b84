"""Continues texts: reads each, then decodes many together, each with settings of its own."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.config import invalid
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.errors import InputError
from dense_jax.generation.programs import BLOCK, Programs, Rows
from dense_jax.generation.requests import Piece, Prefix, Request, Result
from dense_jax.generation.text import CONTEXT, Spelling, TextEnd
from dense_jax.models.language_model import LanguageModel

# Rows that are decoded together unless it is said otherwise. On a CPU, a step of eight rows of a
# small model takes two to five times as long as a step of one.
BATCH_SIZE = 8
# More than one row are a multiple of this. With two, XLA's CPU backend computes some contractions
# of the first row in another order than those of the second.
_ROWS = 4


class Generator:
  """Continues texts; time and memory per token do not grow with their number.

  A continuation depends on the model, its request and `batch_size` alone, to the last bit: not on
  the other requests, their number or their order. Another batch size changes it by rounding, that
  is, rarely by a token.

  Example:
    generator = Generator(model, tokenizer)
    request = Request(prompt_ids(tokenizer, "def "), Sampling(temperature=0.7), seed=1)
    for result in generator([request]):
      print(result.text)

  Attributes:
    programs: the model's compiled programs.
  """

  def __init__(
      self, model: LanguageModel, tokenizer: Tokenizer | None = None, *,
      batch_size: int = BATCH_SIZE,
  ) -> None:
    """Prepares the programs, which are compiled on first use.

    Args:
      model: any model.
      tokenizer: spells the continuations; None means that results have no text, and requests no
        stop strings.
      batch_size: B, the rows that are decoded together, idle ones among them; above 1 it is
        rounded up to a multiple of 4.

    Raises:
      InputError: `batch_size` is less than 1.
    """
    if batch_size < 1:
      raise invalid("batch_size", batch_size, "an integer >= 1")
    self._tokenizer = tokenizer
    self.programs = Programs(model, 1 if batch_size == 1 else -(-batch_size // _ROWS) * _ROWS)

  def read(self, ids: Sequence[int], prefix: Prefix | None = None) -> Prefix:
    """Reads a text once, for many requests to continue; memory does not grow with its length.

    Raises:
      InputError: there is no id, or one that the vocabulary does not have.
    """
    self._check(Request(ids, prefix=prefix))
    return self.programs.read(ids, prefix)

  def __call__(self, requests: Sequence[Request]) -> list[Result]:
    """Continues each text; returns the results in the order of the requests.

    Raises:
      InputError: a request is not valid; see `Request.check`.
    """
    results = {piece.index: piece.result for piece in self.stream(requests) if piece.result}
    return [results[index] for index in range(len(requests))]

  def stream(
      self, requests: Sequence[Request], *, block: int = BLOCK,
      stop: Callable[[], bool] = lambda: False,
  ) -> Iterator[Piece]:
    """Continues each text; yields pieces as they are decoded.

    Requests begin in order, as rows become free. All pieces of a request come in order, and their
    texts join to the text of its result.

    Args:
      requests: the texts to continue.
      block: tokens that are decoded between pieces, from 1 to 64; no result depends on it.
      stop: is called between blocks, and between prompts that are read; once it returns true, all
        continuations end where they are, and no other prompt is read.

    Raises:
      InputError: a request or `block` is not valid, or there is no request; nothing has been read
        then.
    """
    if not 1 <= block <= BLOCK:
      raise invalid("block", block, f"an integer from 1 to {BLOCK}")
    if not requests:
      raise InputError("prompts = [] is not valid: expected at least one")
    for request in requests:
      self._check(request)
    return self._stream(requests, block, stop)

  def _check(self, request: Request) -> None:
    request.check(self.programs.model.config.vocab_size)
    if request.stop_strings and self._tokenizer is None:
      raise invalid("stop_strings", list(request.stop_strings), "none without a tokenizer")

  def _stream(
      self, requests: Sequence[Request], block: int, stop: Callable[[], bool]
  ) -> Iterator[Piece]:
    programs = self.programs
    waiting = deque(enumerate(requests))
    rows, running = programs.empty(), dict[int, _Continuation]()
    is_stopped = False
    while running or (waiting and not is_stopped):
      free = [row for row in range(programs.batch_size) if row not in running][: len(waiting)]
      for row in free:
        if row != free[0] and (is_stopped := stop()):
          break
        index, request = waiting.popleft()
        prefix = programs.read(request.ids, request.prefix)
        rows = programs.insert(rows, row, prefix, request)
        running[row] = _Continuation(index, request, prefix, self._tokenizer)
      is_stopped = is_stopped or stop()
      keeps = any(each.request.keep_state for each in running.values())
      before, count = rows, 0
      if not is_stopped and any(each.left for each in running.values()):
        rows = jax.tree.map(jnp.copy, rows) if keeps else rows
        rows, tokens_BT, log_probs_BT = programs.decode(rows, block)
        count = tokens_BT.shape[1]
      for row, each in list(running.items()):
        text, used = each.push(tokens_BT[row], log_probs_BT[row]) if count else ("", 0)
        if is_stopped and not each.reason:
          each.reason = "interrupted"
        if not each.reason:
          yield Piece(each.index, text)
          continue
        kept = self._after(before, rows, row, used, count, each) if each.keeps else None
        text += each.end()
        del running[row]
        yield Piece(each.index, text, each.result(kept))
    for index, _ in waiting:
      yield Piece(index, "", Result([], [], "", "interrupted"))

  def _after(
      self, before: Rows, after: Rows, row: int, used: int, count: int, each: "_Continuation"
  ) -> Prefix:
    """Returns a row's text after `used` of a block's tokens, of which there are `count`."""
    if used < count:
      # The row read on after its end. The same program draws the same tokens again.
      after = before
      if used:
        after, _, _ = self.programs.decode(jax.tree.map(jnp.copy, before), used)
    return self.programs.take(after, row, each.last_ids)


class _Continuation:
  """A request that is being decoded."""

  def __init__(
      self, index: int, request: Request, prefix: Prefix, tokenizer: Tokenizer | None
  ) -> None:
    self.index, self.request = index, request
    self.reason = "" if request.max_new_tokens else "length"
    self._ids: list[int] = []
    self._log_probs: list[float] = []
    self._context = prefix.last_ids
    self._spelling = None if tokenizer is None else Spelling(tokenizer, prefix.last_ids)
    self._end = TextEnd(request.stop_strings)
    self._text: list[str] = []

  @property
  def keeps(self) -> bool:
    """True if the result is to have a prefix."""
    return self.request.keep_state

  @property
  def left(self) -> int:
    """The tokens that may still be drawn."""
    return self.request.max_new_tokens - len(self._ids)

  @property
  def last_ids(self) -> Sequence[int]:
    """The last ids of prompt and continuation."""
    return (*self._context, *self._ids[-CONTEXT:])

  def push(self, tokens_T: np.ndarray, log_probs_T: np.ndarray) -> tuple[str, int]:
    """Adds a block's tokens; returns the text that is known now, and the number of used tokens."""
    tokens = tokens_T[: self.left].tolist()
    stop = next((at for at, token in enumerate(tokens) if token in self.request.stop_ids), None)
    if stop is not None:
      tokens, self.reason = tokens[:stop], "stop"
    elif len(tokens) == self.left:
      self.reason = "length"
    # With stop strings token by token, to know which one completes a stop string.
    size = 1 if self.request.stop_strings else max(len(tokens), 1)
    text, used = "", 0
    for start in range(0, len(tokens), size):
      used = start + len(tokens[start : start + size])
      new, is_complete = self._spell(tokens[start : start + size])
      text += new
      if is_complete:
        self.reason = "stop"
        break
    self._ids += tokens[:used]
    self._log_probs += log_probs_T[:used].tolist()
    self._text.append(text)
    return text, used

  def _spell(self, ids: Sequence[int]) -> tuple[str, bool]:
    if self._spelling is None:
      return "", False
    new, is_complete = self._end.push(self._spelling.push(ids))
    if is_complete:
      self._spelling = None
    return new, is_complete

  def end(self) -> str:
    """Returns the text that was held back."""
    if self._spelling is None:
      return ""
    new, is_complete = self._end.push(self._spelling.end())
    self._text.append(new if is_complete else new + self._end.end())
    if is_complete:
      self.reason = "stop"
    return self._text[-1]

  def result(self, prefix: Prefix | None) -> Result:
    """Returns the whole continuation."""
    return Result(self._ids, self._log_probs, "".join(self._text), self.reason, prefix)
