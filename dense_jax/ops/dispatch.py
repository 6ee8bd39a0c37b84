"""The one place that picks an implementation, and the one that looks at the platform."""

import functools
import logging

import jax

from dense_jax.types import InputError

_LOG = logging.getLogger(__name__)

# State form -> its implementations, each with what it is. The first is the default.
IMPLEMENTATIONS = {
    "diagonal": ("associative", "recurrent"),
    "matrix": ("chunked", "associative", "recurrent"),
}


@functools.cache
def resolve(form: str, requested: str, platform: str | None = None) -> str:
  """The implementation that runs.

  Args:
    form: a state's form, a key of IMPLEMENTATIONS.
    requested: "auto" or one of the form's implementations.
    platform: where it will run; None is JAX's default backend. Ahead-of-time compilation
      for another platform names it through `requested`.

  Raises:
    InputError: the form has no such implementation.
  """
  options = IMPLEMENTATIONS[form]
  if requested != "auto":
    if requested not in options:
      raise InputError(
          f"config.model.implementation = {requested!r} is not valid for a {form} state: "
          f"expected auto or one of {', '.join(options)}"
      )
    return requested
  platform = platform or jax.default_backend()
  # On two CPU cores the scan inside rematerialised chunks trains a selective layer 5
  # times as fast as the associative scan, which does more arithmetic to gain lanes.
  chosen = "recurrent" if (form, platform) == ("diagonal", "cpu") else options[0]
  _LOG.info("implementation of %s states on %s: %s", form, platform, chosen)
  return chosen
