"""A text as one stream of tokens, and the windows of that stream.

The stream is the concatenation of all documents, each as [bos] tokens [eos]. Window i of T
tokens has inputs [iT, iT + T) and targets [iT + 1, iT + T + 1), so that every token of the
stream but the first is a target of exactly one window. A document that crosses a window's end
continues in the next window as a new segment.

Examples to fine-tune on (`Document.turns`) are laid out as [bos] prompt response [eos], with more
turns after that. Targets are the responses and the eos after each alone. A window holds whole
examples, as many as fit, because a response means nothing without its prompt; only an example that
is longer than a window continues in the next. Every target is in exactly one window here too, and
windows without one are left out.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from dense_jax.data.cache import digest


class Stream(Protocol):
  """Ids that are read in slices: an array, or `ShardedTokens`."""

  @property
  def dtype(self) -> np.dtype:
    """uint16 or uint32."""
    ...

  def __len__(self) -> int: ...

  def __getitem__(self, place: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Mapped:
  """A memory-mapped array, as it goes to another process."""

  file: Any
  dtype: np.dtype
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """A tokenized text, whose arrays are memory-mapped from disk.

  Attributes:
    tokens: uint16 or uint32 [tokens], the stream.
    starts: int64 [documents], the index in the stream of each document's bos.
    document_bytes: int64 [documents], UTF-8 bytes of each document's text; of an example, those of
      its responses.
    fingerprint: hex digest that identifies the text and the tokenizer.
    responses: int64 [responses, 2], the first index in the stream of each response, and that after
      its eos; None for plain text.
  """

  tokens: Stream
  starts: np.ndarray
  document_bytes: np.ndarray
  fingerprint: str
  responses: np.ndarray | None = None

  def __getstate__(self) -> dict[str, Any]:
    # Another process maps the files again. Only the beginnings of mapped arrays are taken here, so
    # that each is found again by its shape.
    return {
        key: _Mapped(value.filename, value.dtype, value.shape)
        if isinstance(value, np.memmap) and value.filename is not None else value
        for key, value in self.__dict__.items()
    }

  def __setstate__(self, state: dict[str, Any]) -> None:
    for key, value in state.items():
      if isinstance(value, _Mapped):
        value = np.memmap(value.file, value.dtype, mode="r", shape=value.shape)
      object.__setattr__(self, key, value)

  @property
  def num_tokens(self) -> int:
    """Number of tokens in the stream, including each document's bos and eos."""
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    """Number of documents; none is empty."""
    return len(self.starts)

  @property
  def num_bytes(self) -> int:
    """Number of UTF-8 bytes that the targets of all windows spell: of texts, or of responses.

    Bits per byte of the whole text = (summed loss in nats) / ln 2 / num_bytes. The loss of each
    document's eos, or each response's, counts as loss of its text.
    """
    return int(self.document_bytes.sum())

  @property
  def num_targets(self) -> int:
    """Number of predicted tokens over all windows: every token but each document's bos.

    Of examples, every token of a response, and its eos.
    """
    if self.responses is None:
      return self.num_tokens - self.num_documents
    return int((self.responses[:, 1] - self.responses[:, 0]).sum())

  @property
  def targets_per_byte(self) -> float:
    """Predicted tokens per byte of the text that they spell.

    From some of the windows, bits per byte is estimated as
    (mean nats per target) / ln 2 * targets_per_byte.
    """
    return self.num_targets / self.num_bytes

  def num_windows(self, seq_len: int) -> int:
    """Returns the number of windows of `seq_len` input tokens; any may be padded.

    Of plain text only the last one may be.
    """
    if self.responses is None:
      return -(-(self.num_tokens - 1) // seq_len)
    return len(self._windows(seq_len))

  def window(self, index: int, seq_len: int) -> tuple[int, int]:
    """Returns the first index in the stream of a window's tokens, and that after its last target.

    Raises:
      IndexError: there is no such window.
    """
    count = self.num_windows(seq_len)
    if not 0 <= index < count:
      raise IndexError(f"window {index} of {count}")
    if self.responses is None:
      return index * seq_len, min(index * seq_len + seq_len + 1, self.num_tokens)
    low, high = self._windows(seq_len)[index]
    return int(low), int(high)

  def row(self, index: int, seq_len: int) -> dict[str, np.ndarray]:
    """Returns window `index` of the stream; the documents in it are found by bisection.

    Its arrays are those of `RowStore.row`. The loss mask is false where the target is a document's
    bos or in a prompt.

    Raises:
      IndexError: there is no such window.
    """
    low, high = self.window(index, seq_len)
    length = high - low - 1
    # Document starts in (low, low + length]: the first input begins a segment in any case, and
    # low + length is the index of the last target.
    first, last = np.searchsorted(self.starts, (low, low + length), side="right")
    borders = np.asarray(self.starts[first:last]) - low
    begins = np.zeros(length + 1, bool)
    begins[borders] = True
    window = self.tokens[low:high].astype(np.int32)

    segment_ids = 1 + np.cumsum(begins[:length], dtype=np.int32)
    places = np.arange(length, dtype=np.int32)
    positions = places - np.maximum.accumulate(np.where(begins[:length], places, 0))
    loss_mask = ~begins[1:] if self.responses is None else self._in_responses(low + 1, high)
    pad = (0, seq_len - length)
    return {
        "tokens": np.pad(window[:-1], pad),
        "targets": np.pad(window[1:], pad),
        "loss_mask": np.pad(loss_mask, pad),
        "segment_ids": np.pad(segment_ids, pad),
        "positions": np.pad(positions, pad),
    }

  def _in_responses(self, low: int, high: int) -> np.ndarray:
    """Returns bool [high - low], true at the tokens low to high - 1 that belong to a response."""
    assert self.responses is not None
    first = np.searchsorted(self.responses[:, 1], low, side="right")
    last = np.searchsorted(self.responses[:, 0], high, side="left")
    inside = np.zeros(high - low, bool)
    for begin, end in self.responses[first:last]:
      inside[max(begin - low, 0) : end - low] = True
    return inside

  def _windows(self, seq_len: int) -> np.ndarray:
    """Returns int64 [windows, 2], the bounds of all windows of examples."""
    if seq_len not in self._known_windows:
      self._known_windows[seq_len] = _windows_of_examples(self, seq_len)
    return self._known_windows[seq_len]

  @functools.cached_property
  def _known_windows(self) -> dict[int, np.ndarray]:
    return {}

  def prompt(self, document: int, most: int) -> list[int]:
    """Returns ids of a document that a model can continue, without bos.

    Args:
      document: the document's number.
      most: the most ids of a plain text; of an example they are all of its first prompt.
    """
    first = int(self.starts[document]) + 1
    if self.responses is not None:
      end = int(self.responses[np.searchsorted(self.responses[:, 0], first), 0])
    else:
      is_last = document + 1 == self.num_documents
      end = int(self.num_tokens if is_last else self.starts[document + 1]) - 1  # Without eos.
      end = min(end, first + most)
    return self.tokens[first:end].tolist()

  def first(self, most: int) -> "TokenStore":
    """Returns the store of the first documents that have at most `most` tokens together.

    Raises:
      ValueError: the first document alone has more.
    """
    if self.num_tokens <= most:
      return self
    count = int(np.searchsorted(self.starts, most, side="right")) - 1
    if not count:
      raise ValueError(f"the first document has more than {most:,} tokens")
    end = int(self.starts[count])
    responses = self.responses
    return dataclasses.replace(
        self, tokens=self.tokens[:end], starts=self.starts[:count],
        document_bytes=self.document_bytes[:count],
        fingerprint=digest(self.fingerprint, "first", count),
        responses=None if responses is None else responses[responses[:, 1] <= end],
    )

  def texts(self, decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yields the text that the loss counts: that of each document, or of each response.

    Args:
      decode: ids -> text, of the tokenizer. A text that the tokenizer does not restore exactly is
        as it decodes it.
    """
    spans = self.responses
    if spans is None:
      ends = np.append(self.starts[1:], self.num_tokens)
      spans = np.stack([np.asarray(self.starts) + 1, ends], axis=1)
    for begin, end in spans:
      yield decode(self.tokens[begin : end - 1].tolist())

  def num_cut(self, seq_len: int) -> int:
    """Returns the number of documents that are longer than a window."""
    ends = np.append(self.starts[1:], self.num_tokens)
    return int(np.sum(ends - self.starts > seq_len + 1))


def _windows_of_examples(store: TokenStore, seq_len: int) -> np.ndarray:
  """Returns the bounds of the windows that hold whole examples, and have targets."""
  ends = [*store.starts[1:].tolist(), store.num_tokens]
  bounds: list[tuple[int, int]] = []
  low, place = 0, 0
  while low < store.num_tokens:
    place = bisect.bisect_right(ends, low + seq_len + 1, lo=place)
    fits = place > 0 and ends[place - 1] > low
    high = ends[place - 1] if fits else low + seq_len + 1
    bounds.append((low, high))
    low = high if fits else high - 1
  windows = np.asarray(bounds, np.int64)
  assert store.responses is not None
  responses = np.asarray(store.responses)
  # The first response that ends after a window's first target must begin before its last one ends.
  first = np.searchsorted(responses[:, 1], windows[:, 0] + 1, side="right")
  begins = np.append(responses[:, 0], store.num_tokens)[first]
  return windows[begins < windows[:, 1]]
