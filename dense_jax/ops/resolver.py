"""The resolver: the only place that chooses implementations and looks at the platform.

A module asks here once, when it is made, for the form of state that it needs, and gets an object
that makes recurrences. No other code asks which implementation runs.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp

from dense_jax.errors import InputError
from dense_jax.ops.attention import gpu
from dense_jax.ops.attention.blockwise import blockwise_attention
from dense_jax.ops.attention.reference import Attend, softmax_attention
from dense_jax.ops.attention.tpu import splash_attention
from dense_jax.ops.cpu import cpu_delays, cpu_matmul, cpu_split_groups, split_groups
from dense_jax.ops.cross_entropy import LogitForm, sums_at_once, sums_in_turn
from dense_jax.ops.diagonal.cpu import CpuRecurrentDiagonal
from dense_jax.ops.diagonal.form import DiagonalForm
from dense_jax.ops.diagonal.kernel_sequence import (
    GpuDiagonal,
    InterpretedGpuDiagonal,
    InterpretedTpuDiagonal,
    TpuDiagonal,
)
from dense_jax.ops.diagonal.sequence import (
    AssociativeDiagonal,
    DiagonalSequence,
    RecurrentDiagonal,
)
from dense_jax.ops.heads import broadcast_heads, repeat_heads
from dense_jax.ops.injection import Inject, inject
from dense_jax.ops.injection_gpu import gpu_inject
from dense_jax.ops.lti.form import LtiForm
from dense_jax.ops.lti.sequence import ChunkedLti, ConvolvedLti, LtiSequence, RecurrentLti
from dense_jax.ops.matmul import gpu_matmul, matmul
from dense_jax.ops.matrix.cpu import CpuChunkedMatrix, cpu_matrix_step
from dense_jax.ops.matrix.form import MatrixForm
from dense_jax.ops.matrix.kernel_sequence import (
    GpuMatrix,
    InterpretedGpuMatrix,
    InterpretedTpuMatrix,
    TpuMatrix,
)
from dense_jax.ops.matrix.reference import matrix_step
from dense_jax.ops.matrix.sequence import (
    AssociativeMatrix,
    ChunkedMatrix,
    MatrixSequence,
    RecurrentMatrix,
)
from dense_jax.ops.short_conv import Convolve, convolve, delays_by_padding
from dense_jax.ops.short_conv_gpu import gpu_convolve
from dense_jax.types import WIDTH_AXIS, Array

_LOG = logging.getLogger(__name__)

# Kernels -> the platform that they are for. On any other one their name resolves to itself and
# INTERPRETED: the same kernels, interpreted.
PLATFORMS = {"pallas": "tpu", "triton": "gpu"}
INTERPRETED = " (interpreted)"

# Form of state -> implementation -> its class. "auto" chooses kernels by `KERNELS` only.
_DIAGONAL: Mapping[str, type[DiagonalSequence]] = {
    "associative": AssociativeDiagonal, "pallas": TpuDiagonal, "triton": GpuDiagonal,
    "recurrent": RecurrentDiagonal, "pallas" + INTERPRETED: InterpretedTpuDiagonal,
    "triton" + INTERPRETED: InterpretedGpuDiagonal,
}
_MATRIX: Mapping[str, type[MatrixSequence]] = {
    "chunked": ChunkedMatrix, "associative": AssociativeMatrix, "pallas": TpuMatrix,
    "triton": GpuMatrix, "recurrent": RecurrentMatrix,
    "pallas" + INTERPRETED: InterpretedTpuMatrix,
    "triton" + INTERPRETED: InterpretedGpuMatrix,
}
_LTI: Mapping[str, type[LtiSequence]] = {
    "conv": ConvolvedLti, "chunked": ChunkedLti, "recurrent": RecurrentLti,
}
_ATTENTION: Mapping[str, Attend] = {
    "blockwise": blockwise_attention, "cudnn": gpu.cudnn_attention, "pallas": splash_attention,
    "softmax": softmax_attention,
    "pallas" + INTERPRETED: functools.partial(splash_attention, interpret=True),
}
# Form of state -> the implementations that a configuration may ask for.
IMPLEMENTATIONS = {
    form: tuple(name for name in classes if not name.endswith(INTERPRETED))
    for form, classes in {"diagonal": _DIAGONAL, "matrix": _MATRIX, "lti": _LTI,
                          "attention": _ATTENTION}.items()
}

# (form of state, platform) -> the kernels that "auto" takes, where the compiler's bytes say so.
KERNELS: Mapping[tuple[str, str], str] = {
    ("matrix", "gpu"): "triton", ("matrix", "tpu"): "pallas",
    ("diagonal", "gpu"): "triton", ("diagonal", "tpu"): "pallas",
}
# Forms whose kernels were found to compute something else on this machine.
_REFUSED: set[str] = set()

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
  """Returns the object that makes recurrences with diagonal states.

  Args:
    requested: `config.model.implementation`.
    chunk: `config.model.chunk`, tokens per chunk; 0 means the implementation's default.

  Raises:
    InputError: diagonal states have no implementation of that name.
  """
  sequence = _DIAGONAL[resolve("diagonal", requested)]
  if sequence is RecurrentDiagonal and _platform() == "cpu":
    sequence = CpuRecurrentDiagonal
  return DiagonalForm(sequence, chunk)


def matrix_form(requested: str, chunk: int, *, equal_decays: bool = False) -> MatrixForm:
  """Returns the object that makes recurrences with matrix states.

  Args:
    requested: as in `diagonal_form`.
    chunk: as there.
    equal_decays: true if every layer of the model has the same decays.
  """
  sequence = _MATRIX[resolve("matrix", requested)]
  if _platform() != "cpu":
    return MatrixForm(sequence, matrix_step, chunk, equal_decays)
  if sequence is ChunkedMatrix:
    sequence = CpuChunkedMatrix
  return MatrixForm(sequence, cpu_matrix_step, chunk, equal_decays)


def lti_form(requested: str, chunk: int) -> LtiForm:
  """Returns the object that makes recurrences of time-invariant systems; see `diagonal_form`."""
  name = resolve("lti", requested)
  return LtiForm(_LTI[name], chunk)


def attention_function(requested: str, dtype: jnp.dtype, head_dim: int) -> Attend:
  """Returns the function that computes attention over whole sequences.

  Args:
    requested: `config.model.implementation`.
    dtype: that of queries, keys and values.
    head_dim: N.

  Raises:
    InputError: attention has no implementation of that name, or cuDNN is asked for where there is
      no GPU or for what it does not cover.
  """
  name = resolve("attention", requested)
  if name != "cudnn":
    return _ATTENTION[name]
  covered = gpu.covers(dtype, head_dim)
  if requested == "auto":
    return _ATTENTION["cudnn" if covered else "blockwise"]
  if not covered or _platform() != "gpu":
    raise InputError(
        "config.model.implementation = 'cudnn' is not valid here: expected auto or blockwise, or "
        f"a GPU, dtype bfloat16, and heads of a multiple of 8 channels, at most {gpu.MAX_HEAD_DIM}"
    )
  return _ATTENTION[name]


def matmul_function() -> Callable[[Array, Array], Array]:
  """Returns `matmul`, or the platform's own form of it."""
  return {"cpu": cpu_matmul, "gpu": gpu_matmul}.get(_platform(), matmul)


def joins_narrow_products() -> bool:
  """Returns whether low-rank maps of one input are better joined to one.

  On a TPU, where the parts of the result would be copied, that moves 3 % more in a train step of
  mamba2 with injected inputs (m = 1, v5e); on a GPU 2 % less.
  """
  return _platform() == "gpu"


def decoding_options() -> dict[str, str]:
  """Returns the compiler's options for a loop that decodes.

  XLA's GPU backend would join the kernels that multiply one input, and copy them to do so, at each
  token.
  """
  return {"xla_gpu_dot_merger_threshold_mb": "0"} if _platform() == "gpu" else {}


def training_options() -> dict[str, str | bool]:
  """Returns the compiler's options for a train step.

  XLA's GPU backend would join the products of one input and copy their parts out of the result, and
  fill the buffers of all layers' saved values with zeros before a loop that writes them.
  """
  if _platform() != "gpu":
    return {}
  options: dict[str, str | bool] = {"xla_gpu_dot_merger_threshold_mb": "0"}
  if jax.__version_info__ >= (0, 11):  # Older compilers may not know it.
    options["xla_gpu_enable_dus_accumulator_zero_init_elimination"] = True
  return options


def logit_form() -> LogitForm:
  """Returns what is done with a chunk's logits.

  A TPU's compiler makes their gradients part of the product that computes them again: two thirds
  of the bytes. A GPU's writes the logits each time.
  """
  platform = _platform()
  return LogitForm(sums_at_once if platform == "gpu" else sums_in_turn, again=platform == "tpu")


def heads_function() -> Callable[[Array, int], Array]:
  """Returns `broadcast_heads`, or `repeat_heads` if the platform is a TPU."""
  return repeat_heads if _platform() == "tpu" else broadcast_heads


def groups_function() -> Callable[[Array, int], Array]:
  """Returns `split_groups`, or `cpu_split_groups` if the platform is a CPU."""
  return cpu_split_groups if _platform() == "cpu" else split_groups


def convolution(form: str, requested: str, *, split: bool) -> Convolve:
  """Returns the function that computes short convolutions over whole sequences.

  Args:
    form: the form of state of the mixer; where that has kernels for GPUs, the convolution has too.
    requested: `config.model.implementation`.
    split: whether the mesh's width axis splits channels.
  """
  name = resolve(form, requested)
  if name in ("triton", "triton" + INTERPRETED):
    axis = WIDTH_AXIS if split else None
    return functools.partial(gpu_convolve, axis=axis, interpret=name != "triton")
  return functools.partial(
      convolve, delays=cpu_delays if _platform() == "cpu" else delays_by_padding
  )


def injection(form: str, requested: str) -> Inject:
  """Returns the function that injects inputs; see `convolution`."""
  name = resolve(form, requested)
  if name in ("triton", "triton" + INTERPRETED):
    return functools.partial(gpu_inject, interpret=name != "triton")
  return inject


def resolve(form: str, requested: str) -> str:
  """Returns the name of the implementation that runs.

  Args:
    form: the form of state, a key of IMPLEMENTATIONS.
    requested: "auto" or one of the form's implementations.

  Raises:
    InputError: the form has no implementation of that name.
  """
  options, platform = IMPLEMENTATIONS[form], _platform()
  if requested == "auto":
    return _choose(form, platform)
  if requested not in options:
    raise InputError(
        f"config.model.implementation = {requested!r} is not valid for a {form} state: "
        f"expected auto or one of {', '.join(options)}"
    )
  return requested + INTERPRETED * (PLATFORMS.get(requested, platform) != platform)


def refuse_kernels(form: str) -> None:
  """Makes "auto" choose a form without kernels from here on, for the states of a form."""
  _REFUSED.add(form)
  _choose.cache_clear()


def _platform() -> str:
  return _TARGET.get() or jax.default_backend()


@functools.cache  # So that the choice is logged once.
def _choose(form: str, platform: str) -> str:
  # The associative scan does more arithmetic to gain parallelism. On two CPU cores, the token
  # scan inside rematerialised chunks trains a selective layer 5 times as fast. TPUs have enough
  # parallelism in B N E, and by their compiler the token scan moves 2 % (v5p) to 76 % (v6e) of
  # the bytes (tests/ops/test_tpu_compile.py).
  diagonal = "recurrent" if platform in ("cpu", "tpu") else "associative"
  attention = {"gpu": "cudnn", "tpu": "pallas"}.get(platform, "blockwise")
  chosen = {
      "diagonal": diagonal, "matrix": "chunked", "lti": "conv", "attention": attention,
  }[form]
  if form not in _REFUSED:
    chosen = KERNELS.get((form, platform), chosen)
  note = " (chunked where rows hold several documents or go on from a state)"
  _LOG.info(
      "implementation of %s states on %s: %s%s", form, platform, chosen,
      note if chosen == "conv" else "",
  )
  return chosen
