"""Rules for changing the configuration of a run that is resumed.

Every key matches exactly one row of one table, `CHANGES`:

| may change | keys | what changes with them |
|---|---|---|
| never | the seed, model, data, batch size | the model, or the order of the batches |
| freely | implementation, memory, mesh, logging, intervals, places | the rounding, or less |
| when asked | optimizer and its schedule, steps, loss, averages, guard, mixtures | the course |

To ask means to name a key with `--allow-change`. `train.steps` and `optimizer.schedule_steps` need
this only if they change the learning rate of a step that is still to be done.
"""

import enum
import re
from collections.abc import Collection, Mapping
from typing import Any

from dense_jax.config import ExperimentConfig, OptimizerConfig, defaults, invalid
from dense_jax.errors import InputError, did_you_mean

FLAG = "--allow-change"
_STEPS, _SCHEDULE_STEPS = "train.steps", "optimizer.schedule_steps"


class Change(enum.Enum):
  """The condition under which a key may change when a run is resumed."""

  NEVER = "never"
  FREELY = "freely"
  ASKED = "when asked"


# Pattern of a key -> condition. Each key matches one pattern. The paths of text and tokenizer may
# change freely, because their content is compared with what the run began with.
CHANGES = {
    r"seed": Change.NEVER,
    r"model\.(family|vocab_size|width|layers|tie_embeddings|norm_eps|dtype)": Change.NEVER,
    r"model\.(dense|mixer)\..*": Change.NEVER,
    r"model\.(implementation|chunk|remat|block_layers|state_dtype)": Change.FREELY,
    r"data\.(heldout_every|format|template|seq_len|packing|vocab_size)": Change.NEVER,
    r"data\.(path|heldout_path|tokenizer|cache_dir|workers)": Change.FREELY,
    r"data\.mixture": Change.ASKED,  # Of steps to come alone: `TrainBatches.set_state` sees to it.
    r"data\.task\.(name|vocab_size|size|depth|passkey_depth|seed|heldout)": Change.NEVER,
    r"data\.task\.eval_(lengths|depths)": Change.FREELY,
    r"optimizer\..*": Change.ASKED,
    r"train\.batch_size": Change.NEVER,
    r"train\.(steps|z_loss|ema)": Change.ASKED,
    r"train\.(accumulate|loss_chunk|eval_batches|checkpoint_minutes|keep_last|keep_best|.*_every)":
        Change.FREELY,
    r"guard\.(skip|sigmas|window|in_a_row)": Change.ASKED,
    r"guard\.returns": Change.FREELY,
    r"(watch|eval)\..*": Change.FREELY,
    r"mesh\..*": Change.FREELY,
}

# Patterns of keys that came after results were recorded by the course that they belong to. At its
# default such a key changes nothing, and is left out of the course, so that records stay valid.
LATER = (r"guard\..*", r"data\.(mixture|packing)")


def classify(key: str) -> Change:
  """Returns the condition for a key such as "train.steps"; a leading "config." is ignored.

  Raises:
    ValueError: the key matches no row of `CHANGES`, or several.
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
  """Returns all values of a configuration by their dotted keys, without "config."."""
  return _flat(defaults(config), "")


def course(config: ExperimentConfig) -> dict[str, Any]:
  """Returns all values that determine what a run computes, by key, but for the seed and the text.

  Keys that came later (`LATER`) are among them only with another value than their default.
  """
  usual = keys(ExperimentConfig())
  return {
      key: value for key, value in keys(config).items()
      if key != "seed" and classify(key) is not Change.FREELY
      and not (value == usual.get(key) and any(re.fullmatch(later, key) for later in LATER))
  }


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    flat.update(
        _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    )
  return flat


def check_allowed(config: ExperimentConfig, allow_change: Collection[str]) -> None:
  """Checks that the names given to `--allow-change` are keys that change only when asked.

  A named key need not differ from the run's: the command that changed it may be repeated.

  Raises:
    InputError: a name is no key, or the key never changes or changes freely.
  """
  known = keys(config)
  for name in allow_change:
    key = name.removeprefix("config.")
    if key not in known:
      hint = did_you_mean(key, known)
      asked = ", ".join(key for key in known if classify(key) is Change.ASKED)
      raise InputError(f"unknown key {name} of {FLAG}{hint} Keys that it takes: {asked}")
    if classify(key) is Change.NEVER:
      raise invalid(FLAG, key, "a key that may change; this one never does, in a run that goes on")
    if classify(key) is Change.FREELY:
      raise invalid(FLAG, key, "a key that must be asked for; this one changes freely, without it")


def check(
    before: ExperimentConfig, now: ExperimentConfig, step: int, allow_change: Collection[str] = ()
) -> None:
  """Checks that a run can be resumed with another configuration.

  Args:
    before: the run's configuration so far.
    now: the configuration to resume with. A vocabulary of 0 means the tokenizer's, as in the run.
    step: updates done.
    allow_change: keys that may change because they were named, with or without "config.".

  Raises:
    InputError: keys that never change differ; `train.steps` is less than `step`; or keys that
      change only when asked differ and were not named. The error gives both values of each key
      and says what to do.
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
  # These two determine the order of batches. Restoring the position would fail too, but later.
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
    changed = [key for key in changed if key != _STEPS]  # The schedule does not depend on it.
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
  length = before.optimizer.schedule_length(before.train.steps)
  return (
      f" With --config.optimizer.schedule_steps={length} the schedule stays as it is, and "
      "train.steps may change without asking."
  )


def follows_length(optimizer: OptimizerConfig) -> bool:
  """Returns whether the learning rate of any update depends on the schedule's length."""
  return optimizer.schedule != "constant" or optimizer.warmup_fraction > 0


def _rates_to_come(config: ExperimentConfig, step: int) -> tuple[int, int]:
  """Returns the numbers on which the learning rates of updates from `step` on depend.

  Returns:
    The schedule's length, or 0 if none of these rates depends on it; and the number of warm-up
    updates, or 0 once the warm-up is over.
  """
  length = config.optimizer.schedule_length(config.train.steps)
  warmup = config.optimizer.warmup_steps(config.train.steps)
  is_over = config.optimizer.schedule == "constant" or length < step
  return 0 if is_over else length, warmup if warmup > step else 0
