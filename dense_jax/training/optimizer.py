"""AdamW, its learning-rate schedules, and the rules for which parameters decay."""

import re

import jax
import optax

from dense_jax.config import OptimizerConfig
from dense_jax.types import Params, PyTree

# Pattern of a parameter's whole path -> whether it decays. Each parameter matches one.
WEIGHT_DECAY = {
    r"embedding|head": True,
    r".*\.kernel": True,
    r".*(^|\.)scale": False,  # norms
    r".*\.(a_log|d|dt_bias|bias|log_a|a_imag|p|b|c|log_dt)": False,  # recurrences, biases
    r".*\.linear": False,  # a dense connection's map that starts at the identity
    r".*\.transition\.(down|up)": True,
}


def decay_mask(names: Params | list[str]) -> dict[str, bool]:
  """Maps each parameter path to whether weight decay applies.

  Raises:
    ValueError: a parameter matches no rule, or several.
  """
  mask = {}
  for name in names:
    matches = [pattern for pattern in WEIGHT_DECAY if re.fullmatch(pattern, name)]
    if len(matches) != 1:
      raise ValueError(
          f"parameter {name} matches {len(matches)} weight-decay rules {matches}: expected one "
          "of dense_jax.training.optimizer.WEIGHT_DECAY"
      )
    mask[name] = WEIGHT_DECAY[matches[0]]
  return mask


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns the learning-rate schedule, a function of the update's number (from 0).

  Args:
    config: the optimizer's configuration.
    steps: the schedule's length if `config.schedule_steps` is 0. The last update of the schedule
      has the final rate, and so have all later updates.
  """
  warmup = config.warmup_steps(steps)
  steps = config.schedule_length(steps)
  peak, final = config.learning_rate, config.learning_rate * config.final_fraction
  rest = max(steps - warmup - 1, 1)  # The last update is number steps - 1.
  match config.schedule:
    case "constant":
      main = optax.constant_schedule(peak)
    case "cosine":
      main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    case "polynomial":
      main = optax.polynomial_schedule(peak, final, config.power, rest)
    case "wsd":
      decay = max(round(config.decay_fraction * steps), 1)
      main = optax.join_schedules(
          [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)],
          [max(rest - decay, 0)],
      )
    case other:
      raise ValueError(f"unknown schedule {other}")
  if not warmup:
    return main
  # The first update already moves: a rate of zero would waste it.
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, main], [warmup])


def _with_dtypes(
    adam: optax.GradientTransformation, first: str, second: str
) -> optax.GradientTransformation:
  """Wraps Adam to keep its moments in these dtypes between updates; it computes in float32."""

  def cast(state: optax.ScaleByAdamState, first: str, second: str) -> optax.ScaleByAdamState:
    moments = {"mu": first, "nu": second}
    return state._replace(**{
        name: jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), getattr(state, name))
        for name, dtype in moments.items()
    })

  def init(params: Params) -> PyTree:
    return cast(adam.init(params), first, second)

  def update(gradients: Params, state: PyTree, params: Params | None = None) -> tuple[PyTree, ...]:
    updates, state = adam.update(gradients, cast(state, "float32", "float32"), params)
    return updates, cast(state, first, second)

  return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig, steps: int, names: list[str]
) -> optax.GradientTransformation:
  """Makes AdamW with decoupled weight decay, after clipping of the gradient by its global norm.

  The state has one structure, with and without clipping, so a run may change from one to the other.

  Args:
    config: the optimizer's configuration.
    steps: the run's number of updates; see `learning_rate`.
    names: the paths of all parameters.
  """
  adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(
      clip,
      _with_dtypes(adam, config.first_moment_dtype, config.second_moment_dtype),
      optax.add_decayed_weights(config.weight_decay, decay_mask(names)),
      optax.scale_by_learning_rate(learning_rate(config, steps)),
  )
