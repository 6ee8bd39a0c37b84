"""What parses the project's files is not disturbed by garbage."""

import ast
import gc

from tests.helpers import ROOT
from tests.syntax import parse


class Garbage:
  """A cycle that parses when it is collected, as the traceback of an orphaned coroutine does."""

  def __init__(self):
    self.me = self

  def __del__(self):
    ast.parse("def f():\n  return (1 + 2) * g(3)\n")


def test_garbage_does_not_end_a_parse():
  text = (ROOT / "dense_jax" / "training" / "stored.py").read_text(encoding="utf-8")
  before = gc.get_threshold()
  gc.set_threshold(20)
  try:
    for _ in range(100):
      Garbage()
    assert parse(text).body
    assert gc.isenabled()
  finally:
    gc.set_threshold(*before)
