"""Tries out the kernels that a run would choose by itself, on the device that it runs on."""

import math
import sys
from typing import Any

import jax

from dense_jax import distributed
from dense_jax.config import ModelConfig
from dense_jax.errors import InputError
from dense_jax.models.params import abstract_model
from dense_jax.models.registry import family
from dense_jax.ops import resolver
from dense_jax.ops.kernel_check import LIMITS, kernel_errors
from dense_jax.ops.recurrence import Sizes


def state_sizes(config: ModelConfig) -> Sizes:
  """Returns the sizes of a layer's states; the family's form of state has to have kernels."""
  stack = abstract_model(config).stack
  # Mixers whose form of state has kernels have sizes.
  mixer: Any = [*stack.prefix_layers, *stack.scanned_layers][0].mixer
  return mixer.sizes


def check_kernels(config: ModelConfig, *, strict: bool = False) -> bool:
  """Compares the kernels that `implementation=auto` chooses here with their specification.

  If they do not compute the same, models that are made from here on take the form without kernels,
  and standard error says so. Does nothing if no kernels were chosen, or if they were asked for by
  name. All processes must call it.

  Args:
    config: the model's configuration.
    strict: true to raise an error instead of taking another form.

  Returns:
    Whether a model that was made before keeps its form.

  Raises:
    InputError: `strict`, and the kernels compute something else.
  """
  form = family(config.family).form
  chosen = resolver.resolve(form, config.implementation)
  kernels = {name for (of, _), name in resolver.KERNELS.items() if of == form}
  if config.implementation != "auto" or chosen not in kernels:
    return True
  # Outside of what follows, where an error counts as the kernels'.
  sizes = state_sizes(config)
  limit = LIMITS[config.dtype]
  failure = ""
  try:
    errors = kernel_errors(
        form, chosen, sizes, config.dtype,
        injection=config.dense.depth > 0 and config.dense.inject == "inputs",
    )
  except Exception as error:  # A compiler that refuses a kernel may raise anything.
    errors, failure = {"nothing, as they failed": math.inf}, f" ({type(error).__name__}: {error})"
  wrong = {name: error for name, error in errors.items() if not error <= limit}
  if not distributed.any_process(bool(wrong)):
    return True
  device = jax.local_devices()[0].device_kind
  named = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
  found = (
      f"the kernels ({chosen}) of {form} states do not compute what they should on {device} with "
      f"jax {jax.__version__}: off, relative to a limit of {limit:g}: "
      f"{named or 'nothing here, but in another process'}{failure}"
  )
  if strict:
    raise InputError(
        f"{found}. With --strict nothing else is tried; --config.model.implementation names a form"
    )
  resolver.refuse_kernels(form)
  print(
      f"WARNING: {found}. This run takes {resolver.resolve(form, 'auto')!r} instead, which is "
      "slower and right. Please report it.", file=sys.stderr, flush=True,
  )
  return False
