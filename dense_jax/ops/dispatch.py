"""The one place that picks an implementation, and the one that looks at the platform."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator

import jax

from dense_jax.errors import InputError

_LOG = logging.getLogger(__name__)

# State form -> its implementations. The first is the default. Convolutions serve rows that
# are one document from its beginning; others take chunks. "pallas", kernels for TPUs, is
# chosen by nobody but the user until it has been measured on a chip.
IMPLEMENTATIONS = {
    "diagonal": ("associative", "pallas", "recurrent"),
    "matrix": ("chunked", "associative", "pallas", "recurrent"),
    "lti": ("conv", "chunked", "recurrent"),
    "attention": ("softmax",),
}


# What "pallas" resolves to where there is no TPU: the same kernels, interpreted.
INTERPRETED = "pallas (interpreted)"
KERNELS = ("pallas", INTERPRETED)

_TARGET: contextvars.ContextVar[str] = contextvars.ContextVar("target", default="")


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Models made inside are compiled ahead of time for `platform` ("tpu", "gpu", "cpu")."""
  token = _TARGET.set(platform)
  try:
    yield
  finally:
    _TARGET.reset(token)


def resolve(form: str, requested: str) -> str:
  """The implementation that runs.

  Args:
    form: a state's form, a key of IMPLEMENTATIONS.
    requested: "auto" or one of the form's implementations.

  Raises:
    InputError: the form has no such implementation.
  """
  options = IMPLEMENTATIONS[form]
  platform = _TARGET.get() or jax.default_backend()
  if requested == "auto":
    return _choose(form, platform)
  if requested not in options:
    raise InputError(
        f"config.model.implementation = {requested!r} is not valid for a {form} state: "
        f"expected auto or one of {', '.join(options)}"
    )
  return INTERPRETED if requested == "pallas" and platform != "tpu" else requested


@functools.cache  # So that the choice is logged once.
def _choose(form: str, platform: str) -> str:
  # The associative scan does more arithmetic to gain lanes. On two CPU cores the scan inside
  # rematerialised chunks trains a selective layer 5 times as fast; TPUs find lanes enough in
  # B N E, and by their compiler it moves 2 % (v5p) to 76 % (v6e) of the bytes
  # (tests/ops/pallas/test_tpu_compile.py).
  by_token = form == "diagonal" and platform in ("cpu", "tpu")
  chosen = "recurrent" if by_token else IMPLEMENTATIONS[form][0]
  note = " (chunked where rows hold several documents or go on from a state)"
  _LOG.info(
      "implementation of %s states on %s: %s%s", form, platform, chosen,
      note if chosen == "conv" else "",
  )
  return chosen
