"""Synthetic tasks in the place of text: `config.data.task`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import LARGEST_SEED, choice, integer, invalid, number, text

_LENGTHS = "empty, or numbers of tokens with commas between, such as 512,1024"
_DEPTHS = "empty, or numbers from 0 to 1 with commas between, such as 0,0.5,1"


@dataclasses.dataclass(frozen=True)
class TaskConfig(Config, key="config.data.task"):
  """A synthetic task, whose rows are made when they are needed.

  A row is a function of these keys, of data.seq_len and of its number. The loss counts the answers
  alone. docs/data.md defines each task.
  """

  name: str = choice(
      "none", "none", "mqar", "copying", "induction", "passkey", "listops", "parity", "dyck",
      help="none means text; else data.path, data.tokenizer and other keys of text have no effect")
  vocab_size: int = integer(
      0, 0, help="ids of mqar, copying, induction or passkey; 0 means the task's own number, and "
      "the other tasks' numbers are fixed")
  size: int = integer(
      0, 0, 2**16, help="pairs of mqar, tokens that copying or induction copies, digits of the "
      "passkey, arguments that an operator of listops has at most, or kinds of brackets of dyck; "
      "0 means the task's own number")
  depth: int = integer(
      0, 0, 64, help="greatest depth of the trees of listops or of the brackets of dyck; 0 means "
      "the task's own")
  passkey_depth: float = number(
      -1.0, -1, 1, help="where the passkey stands, from 0 (the row's beginning) to 1 (its end); "
      "below 0 it is drawn for each row")
  seed: int = integer(
      0, 0, LARGEST_SEED, help="of the contents of all rows; config.seed chooses those to train on")
  heldout: int = integer(1024, 1, help="held-out rows; no row of training is one of them")
  eval_lengths: str = text(
      "", _LENGTHS, help="further lengths of held-out rows, at which answers are scored as "
      "task_accuracy_512 and task_exact_512, besides task_accuracy and task_exact")
  eval_depths: str = text(
      "", _DEPTHS, help="depths of the passkey at which answers are scored, besides passkey_depth")

  @property
  def exists(self) -> bool:
    """True for a task, false for text."""
    return self.name != "none"

  def lengths(self) -> list[int]:
    """Returns the numbers of `eval_lengths`.

    Raises:
      InputError: they are not positive integers.
    """
    parts = [part.strip() for part in self.eval_lengths.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
      raise invalid("config.data.task.eval_lengths", self.eval_lengths, _LENGTHS)
    return [int(part) for part in parts]

  def depths(self) -> list[float]:
    """Returns the numbers of `eval_depths`.

    Raises:
      InputError: they are not numbers from 0 to 1.
    """
    try:
      depths = [float(part) for part in self.eval_depths.split(",") if part.strip()]
    except ValueError:
      depths = [-1.0]
    if not all(0 <= depth <= 1 for depth in depths):
      raise invalid("config.data.task.eval_depths", self.eval_depths, _DEPTHS)
    return depths
