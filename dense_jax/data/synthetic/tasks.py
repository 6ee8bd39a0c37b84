"""The synthetic tasks by name: what each needs, and how its rows are made."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dense_jax.config import DataConfig, TaskConfig, invalid
from dense_jax.data.synthetic import formal, recall
from dense_jax.data.synthetic.row import Random, Row

_GROUP = "config.data.task"
_BLANK = "_"


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of rows. Functions take the task's keys with no 0 left in them (`resolve`).

  Attributes:
    make: (random, T, keys) -> a row of at most T tokens.
    names: the text of each id; the first is that of `BLANK`.
    shortest: the least T.
    vocab_size: the number of ids unless `config.data.task.vocab_size` gives it; 0 if the task
      leaves no choice.
    least_vocab_size: the least number of ids.
    size: `config.data.task.size` unless it is given; 0 if the task has none.
    least_size: the least of it.
    depth: `config.data.task.depth` unless it is given; 0 if the task has none.
  """

  make: Callable[[Random, int, TaskConfig], Row]
  names: Callable[[TaskConfig], list[str]]
  shortest: Callable[[TaskConfig], int]
  vocab_size: int = 0
  least_vocab_size: Callable[[TaskConfig], int] = lambda keys: 0
  size: int = 0
  least_size: int = 1
  depth: int = 0


def _numbered(prefix: str, count: int) -> list[str]:
  return [f"{prefix}{number}" for number in range(1, count + 1)]


def _mqar_names(keys: TaskConfig) -> list[str]:
  half = keys.vocab_size // 2
  return [_BLANK, *_numbered("k", half - 1), *_numbered("v", keys.vocab_size - half)]


def _passkey_names(keys: TaskConfig) -> list[str]:
  digits = [str(digit) for digit in range(10)]
  return [_BLANK, *digits, "KEY", "?", *_numbered("w", keys.vocab_size - recall.FILLER)]


def _dyck_names(keys: TaskConfig) -> list[str]:
  return [_BLANK, *_numbered("(", keys.size), *_numbered(")", keys.size)]


# What is 0 here is the published size where there is one.
TASKS = {
    "mqar": Task(
        lambda random, length, keys: recall.mqar(random, length, keys.vocab_size, keys.size),
        _mqar_names, lambda keys: 4 * keys.size, vocab_size=8192,
        least_vocab_size=lambda keys: 2 * keys.size + 2, size=8,
    ),
    "copying": Task(
        lambda random, length, keys: recall.copying(random, length, keys.vocab_size, keys.size),
        lambda keys: [_BLANK, *_numbered("d", keys.vocab_size - 2), "?"],
        lambda keys: 2 * keys.size, vocab_size=16, least_vocab_size=lambda keys: 3, size=16,
    ),
    "induction": Task(
        lambda random, length, keys: recall.induction(random, length, keys.vocab_size, keys.size),
        lambda keys: [_BLANK, "=>", *_numbered("d", keys.vocab_size - 2)],
        lambda keys: 2 * keys.size + 2, vocab_size=16, least_vocab_size=lambda keys: 4, size=1,
    ),
    "passkey": Task(
        lambda random, length, keys: recall.passkey(
            random, length, keys.vocab_size, keys.size, keys.passkey_depth),
        _passkey_names, lambda keys: 3 * keys.size + 2, vocab_size=32,
        least_vocab_size=lambda keys: recall.FILLER + 1, size=5,
    ),
    "listops": Task(
        lambda random, length, keys: formal.listops(random, length, keys.size, keys.depth),
        lambda keys: [_BLANK, *map(str, range(10)), *formal.OPERATORS, "]", "="],
        lambda keys: 5, size=10, least_size=2, depth=10,
    ),
    "parity": Task(
        lambda random, length, keys: formal.parity(random, length),
        lambda keys: [_BLANK, "0", "1"], lambda keys: 1,
    ),
    "dyck": Task(
        lambda random, length, keys: formal.dyck(random, length, keys.size, keys.depth),
        _dyck_names, lambda keys: keys.depth, size=8, depth=5,
    ),
}


def resolve(config: TaskConfig) -> TaskConfig:
  """Returns a task's keys with its own numbers where the configuration has 0.

  Raises:
    InputError: a key is set that the task does not have, or a number is too small for it.
  """
  task = TASKS[config.name]
  for key, own in (("vocab_size", task.vocab_size), ("size", task.size), ("depth", task.depth)):
    value = getattr(config, key)
    if value and not own:
      raise invalid(f"{_GROUP}.{key}", value, f"0, for {config.name} leaves no choice of it")
    chosen: dict[str, Any] = {key: value or own}
    config = dataclasses.replace(config, **chosen)
  if config.name != "passkey":
    for key, unset in (("passkey_depth", -1.0), ("eval_depths", "")):
      if getattr(config, key) != unset:
        raise invalid(
            f"{_GROUP}.{key}", getattr(config, key),
            f"{unset!r}, for {config.name} has no passkey",
        )
  least = {"size": task.least_size if task.size else 0,
           "vocab_size": task.least_vocab_size(config), "depth": 2 if task.depth else 0}
  for key, low in least.items():
    if getattr(config, key) < low:
      of = f" with size = {config.size}" if key == "vocab_size" and config.size else ""
      raise invalid(
          f"{_GROUP}.{key}", getattr(config, key), f"an integer >= {low}, which {config.name} needs"
          + of,
      )
  return config


def names(config: TaskConfig) -> list[str]:
  """Returns the text of each id of a task whose keys were resolved."""
  return TASKS[config.name].names(config)


def check(config: DataConfig) -> TaskConfig:
  """Returns the task's keys, resolved.

  Raises:
    InputError: a key is not valid, or rows are too short for the task.
  """
  task = resolve(config.task)
  if config.format != "text":
    raise invalid("config.data.format", config.format, f"text with {_GROUP}.name={task.name}")
  low = TASKS[task.name].shortest(task)
  if config.seq_len < low:
    raise invalid("config.data.seq_len", config.seq_len, _lengths(task, low))
  if min(task.lengths(), default=low) < low:
    raise invalid(f"{_GROUP}.eval_lengths", task.eval_lengths, _lengths(task, low))
  task.depths()
  return task


def _lengths(task: TaskConfig, low: int) -> str:
  size = f" of size {task.size}" if task.size else ""
  return f"integers >= {low}, which {task.name}{size} needs"
