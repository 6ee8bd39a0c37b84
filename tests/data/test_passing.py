"""Batches that are passed over: the others come in their order, whatever the restarts."""

import json

import pytest

from dense_jax.data.passing import PassingOver


class Numbers:
  """Batches that are their numbers."""

  def __init__(self):
    self.step, self.moves = 0, 0

  def go_to(self, step):
    self.step = step
    self.moves += 1

  def __next__(self):
    self.step += 1
    return self.step - 1

  def get_state(self):
    return {"step": self.step, "config.seed": 7, "number": self.step}

  def set_state(self, state):
    assert state["config.seed"] == 7 and "passed_over" not in state
    assert state["number"] == state["step"]  # It is a position that was returned.
    self.step = state["step"]

  def close(self):
    pass


def take(batches, count):
  return [next(batches) for _ in range(count)]


@pytest.mark.parametrize(("spans", "expected"), [
    ([], [0, 1, 2, 3, 4, 5, 6]),
    ([(0, 2)], [2, 3, 4, 5, 6, 7, 8]),
    ([(3, 5), (1, 2)], [0, 2, 5, 6, 7, 8, 9]),
    ([(2, 4), (4, 6), (5, 7)], [0, 1, 7, 8, 9, 10, 11]),
    ([(1, 5), (2, 3)], [0, 5, 6, 7, 8, 9, 10]),
])
def test_the_batches_of_the_steps(spans, expected):
  batches = PassingOver(Numbers(), spans)
  assert take(batches, 7) == expected
  assert [batches.number(step) for step in range(7)] == expected
  for step in range(8):  # From any position, with what a checkpoint's JSON says.
    whole = PassingOver(Numbers(), spans)
    take(whole, step)
    resumed = PassingOver(Numbers())
    resumed.set_state(json.loads(json.dumps(whole.get_state())))
    assert take(resumed, 7 - step) == expected[step:]
    assert resumed.spans == batches.spans


def test_it_moves_only_where_something_is_passed_over():
  numbers = Numbers()
  take(PassingOver(numbers, [(3, 5)]), 9)
  assert numbers.moves == 1


def test_a_position_of_before_gives_what_is_passed_over_now():
  """As after a return to a checkpoint that knows nothing of it yet."""
  batches = PassingOver(Numbers())
  take(batches, 2)
  saved = batches.get_state()
  assert saved == {"step": 2, "config.seed": 7, "number": 2}
  take(batches, 4)
  batches.pass_over([(2, 6)])
  batches.set_state(saved)
  assert take(batches, 2) == [6, 7]
  again = PassingOver(Numbers(), [(2, 6)])
  again.set_state(saved)
  assert take(again, 2) == [6, 7]
