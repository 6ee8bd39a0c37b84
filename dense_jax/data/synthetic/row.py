"""A row of a synthetic task."""

from typing import NamedTuple

import numpy as np

# numpy promises that a RandomState draws the same numbers in every version, and promises nothing
# of the kind for its Generator.
Random = np.random.RandomState

BLANK = 0
"""The id of every task that stands for nothing: padding, noise, bos and eos."""
NO_TARGET = -1


class Row(NamedTuple):
  """A row of a task.

  Attributes:
    tokens: int [n], the inputs.
    targets: int [n], what the model has to say at each input; `NO_TARGET` where that is nothing.
  """

  tokens: np.ndarray
  targets: np.ndarray

  @classmethod
  def of(cls, tokens: np.ndarray) -> "Row":
    """Returns a row of inputs without any target."""
    return cls(tokens, np.full(len(tokens), NO_TARGET))
