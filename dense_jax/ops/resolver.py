"""The resolver: the one place that picks an implementation, and that looks at the platform.

Whoever needs states of a form asks for it here once, when a module is made, and gets an object
that makes recurrences; nobody asks later which implementation it is.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping

import jax

from dense_jax.errors import InputError
from dense_jax.ops.cpu import cpu_matmul
from dense_jax.ops.diagonal.cpu import CpuRecurrentDiagonal
from dense_jax.ops.diagonal.form import DiagonalForm
from dense_jax.ops.diagonal.sequence import (
    AssociativeDiagonal,
    DiagonalSequence,
    RecurrentDiagonal,
)
from dense_jax.ops.diagonal.tpu_sequence import InterpretedDiagonal, KernelDiagonal
from dense_jax.ops.lti.form import LtiForm
from dense_jax.ops.lti.sequence import ChunkedLti, ConvolvedLti, LtiSequence, RecurrentLti
from dense_jax.ops.matmul import matmul
from dense_jax.ops.matrix.cpu import cpu_matrix_step
from dense_jax.ops.matrix.form import MatrixForm
from dense_jax.ops.matrix.reference import matrix_step
from dense_jax.ops.matrix.sequence import (
    AssociativeMatrix,
    ChunkedMatrix,
    MatrixSequence,
    RecurrentMatrix,
)
from dense_jax.ops.matrix.tpu_sequence import InterpretedMatrix, KernelMatrix
from dense_jax.types import Array

_LOG = logging.getLogger(__name__)

# What "pallas" resolves to where there is no TPU: the same kernels, interpreted.
INTERPRETED = "pallas (interpreted)"

# Form of state -> implementation -> its class. "pallas", kernels for TPUs, is chosen by nobody
# but the user until it has been measured on a chip.
_DIAGONAL: Mapping[str, type[DiagonalSequence]] = {
    "associative": AssociativeDiagonal, "pallas": KernelDiagonal, "recurrent": RecurrentDiagonal,
}
_MATRIX: Mapping[str, type[MatrixSequence]] = {
    "chunked": ChunkedMatrix, "associative": AssociativeMatrix, "pallas": KernelMatrix,
    "recurrent": RecurrentMatrix,
}
_LTI: Mapping[str, type[LtiSequence]] = {
    "conv": ConvolvedLti, "chunked": ChunkedLti, "recurrent": RecurrentLti,
}
# Form of state -> the implementations that a configuration may ask for.
IMPLEMENTATIONS = {
    "diagonal": tuple(_DIAGONAL), "matrix": tuple(_MATRIX), "lti": tuple(_LTI),
    "attention": ("softmax",),
}

_TARGET: contextvars.ContextVar[str] = contextvars.ContextVar("target", default="")


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Makes models inside for ahead-of-time compilation for `platform` ("tpu", "gpu", "cpu")."""
  token = _TARGET.set(platform)
  try:
    yield
  finally:
    _TARGET.reset(token)


def diagonal_form(requested: str, chunk: int) -> DiagonalForm:
  """Returns what makes recurrences with diagonal states.

  Args:
    requested: `config.model.implementation`.
    chunk: `config.model.chunk`, tokens a chunk; 0 takes the implementation's own.

  Raises:
    InputError: diagonal states have no such implementation.
  """
  name = resolve("diagonal", requested)
  sequence = InterpretedDiagonal if name == INTERPRETED else _DIAGONAL[name]
  if sequence is RecurrentDiagonal and _platform() == "cpu":
    sequence = CpuRecurrentDiagonal
  return DiagonalForm(sequence, chunk)


def matrix_form(requested: str, chunk: int) -> MatrixForm:
  """Returns what makes recurrences with matrix states; see `diagonal_form`."""
  name = resolve("matrix", requested)
  sequence = InterpretedMatrix if name == INTERPRETED else _MATRIX[name]
  step = cpu_matrix_step if _platform() == "cpu" else matrix_step
  return MatrixForm(sequence, step, chunk)


def lti_form(requested: str, chunk: int) -> LtiForm:
  """Returns what makes recurrences of time-invariant systems; see `diagonal_form`."""
  name = resolve("lti", requested)
  return LtiForm(_LTI[name], chunk)


def matmul_function() -> Callable[[Array, Array], Array]:
  """Returns `matmul`, or a function of the same contract that suits the platform."""
  return cpu_matmul if _platform() == "cpu" else matmul


def resolve(form: str, requested: str) -> str:
  """Returns the name of the implementation that runs.

  Args:
    form: a state's form, a key of IMPLEMENTATIONS.
    requested: "auto" or one of the form's implementations.

  Raises:
    InputError: the form has no such implementation.
  """
  options, platform = IMPLEMENTATIONS[form], _platform()
  if requested == "auto":
    return _choose(form, platform)
  if requested not in options:
    raise InputError(
        f"config.model.implementation = {requested!r} is not valid for a {form} state: "
        f"expected auto or one of {', '.join(options)}"
    )
  return INTERPRETED if requested == "pallas" and platform != "tpu" else requested


def _platform() -> str:
  return _TARGET.get() or jax.default_backend()


@functools.cache  # So that the choice is logged once.
def _choose(form: str, platform: str) -> str:
  # The associative scan does more arithmetic to gain lanes. On two CPU cores the scan inside
  # rematerialised chunks trains a selective layer 5 times as fast; TPUs find lanes enough in
  # B N E, and by their compiler it moves 2 % (v5p) to 76 % (v6e) of the bytes
  # (tests/ops/test_tpu_compile.py).
  diagonal = "recurrent" if platform in ("cpu", "tpu") else "associative"
  chosen = {
      "diagonal": diagonal, "matrix": "chunked", "lti": "conv", "attention": "softmax"
  }[form]
  note = " (chunked where rows hold several documents or go on from a state)"
  _LOG.info(
      "implementation of %s states on %s: %s%s", form, platform, chosen,
      note if chosen == "conv" else "",
  )
  return chosen
