"""Which keys may change when a run goes on: one table, in which every key has exactly one row.

| may change | keys | what changes with them |
|---|---|---|
| never | the seed, model, data, batch size | the model, or the order of the batches |
| freely | implementation, memory, mesh, logging, intervals, places | the rounding, or less |
| when asked | the optimizer, its schedule, the number of steps, the loss | the course of the run |

Keys of the last kind are named with `--allow-change`. `train.steps` and `optimizer.schedule_steps`
need it only where they change the learning rate of a step that is still to be done.
"""

import difflib
import enum
import re
from collections.abc import Collection, Mapping
from typing import Any

from dense_jax.config import ExperimentConfig, OptimizerConfig, defaults, invalid
from dense_jax.errors import InputError

FLAG = "--allow-change"
_STEPS, _SCHEDULE_STEPS = "train.steps", "optimizer.schedule_steps"


class Change(enum.Enum):
  """When a key of the configuration may change in a run that goes on."""

  NEVER = "never"
  FREELY = "freely"
  ASKED = "when asked"


# Pattern of a key -> when it may change. Each key matches one. Where text and tokenizer lie may
# change: what they hold is compared with what the run began with.
CHANGES = {
    r"seed": Change.NEVER,
    r"model\.(family|vocab_size|width|layers|tie_embeddings|norm_eps|dtype)": Change.NEVER,
    r"model\.(dense|mixer)\..*": Change.NEVER,
    r"model\.(implementation|chunk|remat|block_layers)": Change.FREELY,
    r"data\.(heldout_every|seq_len|vocab_size)": Change.NEVER,
    r"data\.(path|heldout_path|tokenizer|cache_dir)": Change.FREELY,
    r"optimizer\..*": Change.ASKED,
    r"train\.batch_size": Change.NEVER,
    r"train\.(steps|z_loss)": Change.ASKED,
    r"train\.(accumulate|loss_chunk|eval_batches|keep_last|keep_best|.*_every)": Change.FREELY,
    r"mesh\..*": Change.FREELY,
}


def classify(key: str) -> Change:
  """When a key may change, such as "train.steps"; a leading "config." is passed over.

  Raises:
    ValueError: it matches no row of `CHANGES`, or several.
  """
  name = key.removeprefix("config.")
  found = {pattern: change for pattern, change in CHANGES.items() if re.fullmatch(pattern, name)}
  if len(found) != 1:
    raise ValueError(
        f"key {name} matches {len(found)} rows {[*found]}: expected one of "
        "dense_jax.runs.resume.CHANGES"
    )
  return next(iter(found.values()))


def keys(config: ExperimentConfig) -> dict[str, Any]:
  """All values of a configuration by their dotted keys, without "config."."""
  return _flat(defaults(config), "")


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    flat.update(
        _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    )
  return flat


def check_allowed(config: ExperimentConfig, allow_change: Collection[str]) -> None:
  """Checks that the names given to `--allow-change` are keys that can be asked for.

  A key that has not changed may be named: the same command goes on with a run that it changed.

  Raises:
    InputError: no such key, or one that never changes or needs no asking.
  """
  known = keys(config)
  for name in allow_change:
    key = name.removeprefix("config.")
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
      hint = f"; did you mean {near[0]}?" if near else "."
      asked = ", ".join(key for key in known if classify(key) is Change.ASKED)
      raise InputError(f"unknown key {name} of {FLAG}{hint} Keys that it takes: {asked}")
    if classify(key) is Change.NEVER:
      raise invalid(FLAG, key, "a key that may change; this one never does, in a run that goes on")
    if classify(key) is Change.FREELY:
      raise invalid(FLAG, key, "a key that must be asked for; this one changes freely, without it")


def check(
    before: ExperimentConfig, now: ExperimentConfig, step: int, allow_change: Collection[str] = ()
) -> None:
  """Checks that a run can go on with another configuration.

  Args:
    before: what the run was made with.
    now: what it is to go on with. A vocabulary of 0 is the tokenizer's, and so the run's.
    step: updates done.
    allow_change: keys that were asked for by name, with or without "config.".

  Raises:
    InputError: keys that never change differ; fewer steps than are done; or keys that change
      when asked do, and were not asked for. It names each with both values, and the flag.
  """
  check_allowed(now, allow_change)
  old, new = keys(before), keys(now)
  if not now.model.vocab_size:
    new["model.vocab_size"] = before.model.vocab_size
  changed = [
      key for key in sorted(old.keys() | new.keys())
      if old.get(key) != new.get(key) and classify(key) is not Change.FREELY
  ]
  never = [key for key in changed if classify(key) is Change.NEVER]
  # The order of batches depends on these two. Their position in it says so too, but later.
  if len(never) == 1 and never[0] in ("seed", "train.batch_size"):
    raise invalid(f"config.{never[0]}", new[never[0]], f"{old[never[0]]}, with which the run began")
  if never:
    raise InputError(
        f"the run in --workdir was made with other values of\n{_lines(never, old, new)}\n"
        "Give the same values to go on with it, or another --workdir."
    )
  if now.train.steps < step:
    raise invalid(
        f"config.{_STEPS}", now.train.steps,
        f"an integer >= {step}, the steps that the run in --workdir has done",
    )
  if _rates_to_come(before, step) == _rates_to_come(now, step):
    changed = [key for key in changed if key not in (_STEPS, _SCHEDULE_STEPS)]
  elif now.optimizer.schedule_steps or before.optimizer.schedule_steps:
    changed = [key for key in changed if key != _STEPS]  # It is not what the schedule follows.
  allowed = {name.removeprefix("config.") for name in allow_change}
  asked = [key for key in changed if key not in allowed]
  if asked:
    raise InputError(
        "the run in --workdir would take another course with other values of\n"
        f"{_lines(asked, old, new)}\n"
        f"Add {FLAG} {','.join([*sorted(allowed), *asked])} to change them, or give the same "
        f"values to go on as before.{_keeps_rates(before) if _STEPS in asked else ''}"
    )


def _lines(changed: Collection[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  return "\n".join(
      f"  config.{key}: the run has {old.get(key)!r}, now {new.get(key)!r}" for key in changed
  )


def _keeps_rates(before: ExperimentConfig) -> str:
  return (
      f" With --config.optimizer.schedule_steps={schedule_length(before)} the schedule stays as "
      "it is, and train.steps may change without asking."
  )


def schedule_length(config: ExperimentConfig) -> int:
  """The number of updates after which the learning rate stays as it is."""
  return config.optimizer.schedule_steps or config.train.steps


def follows_length(optimizer: OptimizerConfig) -> bool:
  """Whether the learning rate of some update depends on the schedule's length."""
  return optimizer.schedule != "constant" or optimizer.warmup_fraction > 0


def _rates_to_come(config: ExperimentConfig, step: int) -> tuple[int, int]:
  """The parts of the schedule's length on which the rates of updates from `step` on depend.

  Returns:
    The length, 0 where none of them depends on it; and the updates of the warm-up, 0 once it is
    over.
  """
  length = schedule_length(config)
  warmup = round(config.optimizer.warmup_fraction * length)
  is_over = config.optimizer.schedule == "constant" or length < step
  return 0 if is_over else length, warmup if warmup > step else 0
