"""The text of tokens as they come: whole characters only, and nothing from a stop string on."""

from collections.abc import Sequence

from dense_jax.data.tokenizer import Tokenizer

# Ids before a continuation that decide how it is spelled: the bytes of a character that it
# completes, and any piece that keeps its first piece from losing a space. A few would do.
CONTEXT = 32
# A character of UTF-8 has at most four bytes, so what an unfinished one decodes to is at most
# three of these.
_UNFINISHED, _REPLACEMENT = 3, "\ufffd"


def _finished(text: str) -> int:
  """Returns the length of `text` without what may be an unfinished character at its end."""
  tail = text[-_UNFINISHED:]
  return len(text) - (len(tail) - len(tail.rstrip(_REPLACEMENT)))


def _shared(left: str, right: str) -> int:
  """Returns the length of the beginning that two texts have in common."""
  pairs = enumerate(zip(left, right, strict=False))
  return next((at for at, pair in pairs if pair[0] != pair[1]), min(len(left), len(right)))


class Spelling:
  """Spells a continuation piece by piece; the pieces join to the text of all its tokens.

  Ids are decoded together with those before them, as `dense_jax.data.spelling.spell` does, but
  only with the last few, so that the time does not grow with the length of the text.
  """

  def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
    """Prepares for the continuation of `context`, the last ids of which are used."""
    self._tokenizer = tokenizer
    self._ids = list(context[-CONTEXT:])
    self._text = self._before = tokenizer.decode(self._ids)
    self._said: int | None = None  # How much of _text was returned; None before anything was.

  def push(self, ids: Sequence[int]) -> str:
    """Adds ids; returns the text that is finished now, perhaps none."""
    self._ids += ids
    self._text = self._tokenizer.decode(self._ids)
    new = self._next(_finished(self._text))
    if len(self._ids) > 4 * CONTEXT:
      self._shorten()
    return new

  def end(self) -> str:
    """Returns the rest of the text, in which an unfinished character is U+FFFD."""
    return self._next(len(self._text))

  def _next(self, end: int) -> str:
    if self._said is None:
      if end <= _finished(self._before) and end < len(self._text):
        return ""
      # A character that the continuation completes belongs to the continuation.
      self._said = _shared(self._before, self._text)
    new = self._text[self._said : end]
    self._said = max(self._said, end)
    return new

  def _shorten(self) -> None:
    """Forgets ids and text that what follows does not depend on."""
    if self._said is None:
      return
    pending = len(self._text) - self._said
    ids = self._ids[-CONTEXT:]
    text = self._tokenizer.decode(ids)
    if pending <= len(text):
      self._ids, self._text, self._said = ids, text, len(text) - pending


class TextEnd:
  """Ends a text before the first of its stop strings that is complete, wherever pieces end.

  Of those that are complete at one place, the longest counts.
  """

  def __init__(self, stop_strings: Sequence[str]) -> None:
    """Begins with no text; `stop_strings` are not empty."""
    self._stops = tuple(stop_strings)
    self._longest = max(map(len, self._stops), default=0)
    self._held = ""

  def push(self, text: str) -> tuple[str, bool]:
    """Adds text; returns what no stop string can begin in, and whether one is complete."""
    held = self._held + text
    found = [
        (place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0
    ]
    if found:
      self._held = ""
      return held[: min(found)[1]], True
    size = min(self._longest - 1, len(held))
    while size > 0 and not any(stop.startswith(held[-size:]) for stop in self._stops):
      size -= 1
    size = max(size, 0)
    self._held = held[len(held) - size :]
    return held[: len(held) - size], False

  def end(self) -> str:
    """Returns the text that was held back."""
    held, self._held = self._held, ""
    return held
