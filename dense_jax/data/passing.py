"""Batches of which some are passed over for good, because a run was harmed by them."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from dense_jax.batch import Batch

Span = tuple[int, int]
"""The numbers of the first batch that is passed over, and of the first one after it."""

_PASSED_OVER = "passed_over"


class Batches(Protocol):
  """An iterator of all batches, which moves to any of them; see `batches.TrainBatches`."""

  def __next__(self) -> Batch:
    """Returns the next batch."""

  def get_state(self) -> dict[str, Any]:
    """Returns the position: "step", the number of the next batch, and what identifies them."""

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position that `get_state` returned."""

  def go_to(self, step: int) -> None:
    """Moves to the batch of this number."""

  def close(self) -> None:
    """Stops what prepares batches."""


class PassingOver(Iterator[Batch]):
  """An iterator over the batches that are not passed over.

  Step s (from 0) trains on number s (from 0) of these batches, so that the batch of a step follows
  from the seed, the step and the spans that are passed over.
  """

  def __init__(self, batches: Batches, spans: Sequence[Span] = ()) -> None:
    """Begins at step 0.

    Args:
      batches: all batches, which are this object's from now on.
      spans: what is passed over.
    """
    self._batches = batches
    self._spans = _joined(spans)
    self._step = 0

  @property
  def spans(self) -> list[Span]:
    """The batches that are passed over, in order; no two spans touch."""
    return list(self._spans)

  def number(self, step: int) -> int:
    """Returns the number of a step's batch among all batches."""
    return _number(step, self._spans)

  def pass_over(self, spans: Sequence[Span]) -> None:
    """Passes over more batches, also where it stands."""
    self._spans = _joined([*self._spans, *spans])

  def go_to(self, step: int) -> None:
    """Moves to the batch of a step."""
    self._step = step
    self._follow()

  def _follow(self) -> None:
    """Moves to the batch of the next step, if something before it is passed over."""
    number = self.number(self._step)
    if self._batches.get_state()["step"] != number:
      self._batches.go_to(number)

  def __next__(self) -> Batch:
    """Returns the next step's batch."""
    self._follow()
    self._step += 1
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    """Returns the position: the next step, what is passed over, and what identifies the batches."""
    self._follow()
    position = {**self._batches.get_state(), "step": self._step}
    return {**position, _PASSED_OVER: self._spans} if self._spans else position

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position that `get_state` returned; what was passed over there is so here too.

    Raises:
      InputError: the position belongs to other batches.
    """
    position = dict(state)
    spans = [(first, end) for first, end in position.pop(_PASSED_OVER, [])]
    self._batches.set_state({**position, "step": _number(position["step"], spans)})
    self.pass_over(spans)
    self.go_to(position["step"])

  def close(self) -> None:
    """Stops what prepares batches."""
    self._batches.close()


def _number(step: int, spans: Sequence[Span]) -> int:
  """Returns the number of a step's batch; the spans are in order, and none touches another."""
  number = step
  for first, end in spans:
    if number >= first:
      number += end - first
  return number


def _joined(spans: Sequence[Span]) -> list[Span]:
  """Returns the same batches in order, as few spans as possible."""
  joined: list[Span] = []
  for first, end in sorted(spans):
    if joined and first <= joined[-1][1]:
      joined[-1] = joined[-1][0], max(end, joined[-1][1])
    else:
      joined.append((first, end))
  return joined
