"""The rows of a synthetic task, in the place of a tokenized text."""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from dense_jax.config import DataConfig, TaskConfig, invalid
from dense_jax.data.cache import digest
from dense_jax.data.synthetic.row import NO_TARGET, Random, Row
from dense_jax.data.synthetic.tasks import TASKS, check

_FORMAT = 1  # Increase whenever rows are made or divided differently.
# Rows of training before one comes again.
_ENDLESS = 2**31 - 1
_HELD_OUT_PART = 4
_MOST_TRIES = 10_000


@dataclasses.dataclass(frozen=True)
class TaskStore:
  """Rows of a task, as a `RowStore`; each is made when it is asked for.

  A row is held out if a hash of its tokens says so, one in four of all possible rows. No row of
  training is therefore held out, whatever the seeds.

  Attributes:
    task: the task's keys, resolved.
    heldout: true for the fixed set of held-out rows, false for those to train on.
  """

  task: TaskConfig
  heldout: bool

  @property
  def fingerprint(self) -> str:
    """Hex digest of all that rows depend on, besides their length."""
    keys = dataclasses.replace(self.task, eval_lengths="", eval_depths="")
    return digest("task", _FORMAT, repr(keys), str(self.heldout))

  @property
  def num_bytes(self) -> int:
    """0: the rows are not text."""
    return 0

  @property
  def targets_per_byte(self) -> float | None:
    """Nothing: the rows are not text."""
    return None

  def num_windows(self, seq_len: int) -> int:
    """Returns the number of rows; those to train on are more than any run needs."""
    del seq_len
    return self.task.heldout if self.heldout else _ENDLESS

  def row(self, index: int, seq_len: int) -> dict[str, np.ndarray]:
    """Returns row `index`, padded to `seq_len` tokens; see `RowStore.row`.

    Raises:
      IndexError: there is no such row.
      InputError: the task has too few rows of this length to hold some out.
    """
    if not 0 <= index < self.num_windows(seq_len):
      raise IndexError(f"row {index} of {self.num_windows(seq_len)}")
    row = self._find(index, seq_len)
    pad = (0, seq_len - len(row.tokens))
    has_target = row.targets != NO_TARGET
    return {
        "tokens": np.pad(row.tokens.astype(np.int32), pad),
        "targets": np.pad(np.where(has_target, row.targets, 0).astype(np.int32), pad),
        "loss_mask": np.pad(has_target, pad),
        "segment_ids": np.pad(np.ones(len(row.tokens), np.int32), pad),
        "positions": np.pad(np.arange(len(row.tokens), dtype=np.int32), pad),
    }

  def _find(self, index: int, seq_len: int) -> Row:
    seeds = np.random.SeedSequence([self.task.seed, int(self.heldout), seq_len, index])
    random = Random(np.random.MT19937(seeds))
    make = TASKS[self.task.name].make
    for _ in range(_MOST_TRIES):
      row = make(random, seq_len, self.task)
      if _is_held_out(row.tokens) == self.heldout:
        return row
    raise invalid(
        "config.data.seq_len", seq_len,
        f"more, for {self.task.name} has too few rows of this length to hold some out",
    )


def _is_held_out(tokens: np.ndarray) -> bool:
  content = np.ascontiguousarray(tokens, "<i4").tobytes()
  return hashlib.blake2b(content, digest_size=1).digest()[0] % _HELD_OUT_PART == 0


@dataclasses.dataclass(frozen=True)
class HeldOutRows:
  """Held-out rows of one kind at one length.

  Attributes:
    suffix: ends the names of their scores: "" for rows as in training, else such as "_512",
      "_depth0.5" or "_512_depth0.5".
    store: makes the rows.
    seq_len: T, their length.
  """

  suffix: str
  store: TaskStore
  seq_len: int


def heldout_rows(config: DataConfig) -> Iterator[HeldOutRows]:
  """Yields the rows at which a task's answers are scored: each length with each depth."""
  task = check(config)
  for length in dict.fromkeys([config.seq_len, *task.lengths()]):
    of_length = "" if length == config.seq_len else f"_{length}"
    for depth in dict.fromkeys([task.passkey_depth, *task.depths()]):
      of_depth = "" if depth == task.passkey_depth else f"_depth{depth:g}"
      store = TaskStore(dataclasses.replace(task, passkey_depth=depth), heldout=True)
      yield HeldOutRows(of_length + of_depth, store, length)
