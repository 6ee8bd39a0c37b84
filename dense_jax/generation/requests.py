"""Requests to continue texts, and their results."""

import dataclasses
from collections.abc import Sequence

from dense_jax.config import LARGEST_SEED, invalid
from dense_jax.errors import InputError
from dense_jax.generation.sampling import PLAIN, Sampling
from dense_jax.models.language_model import ModelState
from dense_jax.types import Array

_MOST_NEW = 2**31 - 1  # They are counted on the device, by int32.


@dataclasses.dataclass(frozen=True)
class Prefix:
  """A text of any length that a model has read, in constant size: all that continuing it needs.

  Attributes:
    state: the model's state after the text, B = 1, of the model with every layer compiled apart.
    logits_V: float32 logits of the token that follows.
    seen_V: bool, true for the tokens that the text holds, for the repetition penalty.
    last_ids: the text's last ids, at most `dense_jax.generation.text.CONTEXT`, for the spelling of
      what follows.
  """

  state: ModelState
  logits_V: Array
  seen_V: Array
  last_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Request:
  """One text to continue.

  Attributes:
    ids: the prompt's token ids, which are read after `prefix`; may be empty if there is a prefix.
    sampling: the distribution to draw from.
    max_new_tokens: the most tokens to draw.
    seed: of the draws, from 0 to 2^32 - 1. The token at position p of the text is drawn with the
      key fold_in(key(seed), p).
    stop_ids: token ids that end the continuation and are no part of it.
    stop_strings: texts that end the continuation: its text ends before the first one that is
      complete.
    prefix: a text that the model has read already; None means none.
    keep_state: whether the result has the prefix to continue from.
  """

  ids: Sequence[int]
  sampling: Sampling = PLAIN
  max_new_tokens: int = 128
  seed: int = 0
  stop_ids: Sequence[int] = ()
  stop_strings: Sequence[str] = ()
  prefix: Prefix | None = None
  keep_state: bool = False

  def check(self, vocab_size: int) -> None:
    """Checks all values against each other and the model's vocabulary.

    Raises:
      InputError: a value is not valid.
    """
    if not len(self.ids) and self.prefix is None:
      raise InputError("prompt = [] is not valid: expected at least one token")
    for name, ids in (("prompt", self.ids), ("stop_ids", self.stop_ids)):
      wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
      if wrong is not None:
        raise invalid(f"a token of {name}", wrong, f"an id from 0 to {vocab_size - 1}")
    if not 0 <= self.max_new_tokens <= _MOST_NEW:
      raise invalid("max_new_tokens", self.max_new_tokens, f"an integer from 0 to {_MOST_NEW}")
    if not 0 <= self.seed <= LARGEST_SEED:
      raise invalid("seed", self.seed, f"an integer from 0 to {LARGEST_SEED}")
    if not all(self.stop_strings):
      raise invalid("stop_strings", list(self.stop_strings), "texts that are not empty")


@dataclasses.dataclass(frozen=True)
class Result:
  """One continuation.

  Attributes:
    ids: the drawn token ids, without the stop id. With a stop string, they go on to the token that
      completes it.
    log_probs: the natural logarithm of each token's probability under the model itself: the
      softmax of its logits, before penalty, temperature and all that restricts the choice.
    text: the continuation's text, which ends before the stop string; empty without a tokenizer.
    reason: "stop" (a stop id or string), "length" (`max_new_tokens`) or "interrupted".
    prefix: the prompt and `ids` as the prefix of what may follow; None unless asked for, or where
      the prompt was not read before the interruption.
  """

  ids: list[int]
  log_probs: list[float]
  text: str
  reason: str
  prefix: Prefix | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
  """The part of one continuation that one block of decoding adds.

  Attributes:
    index: the request's place among all requests.
    text: the text that is known to belong to the continuation now; perhaps none.
    result: the whole continuation, in its last piece; None before.
  """

  index: int
  text: str
  result: Result | None = None
