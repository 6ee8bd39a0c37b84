"""Counts the floating-point operations of single XLA instructions.

The counts are those of the mathematics, not of any hardware: 2 M N K for a matmul, one operation
per result element of an arithmetic instruction, one per input element of a reduction. A windowed
reduction counts the same as a plain one, because compilers write cumulative sums, and sums that
are broadcast at once, as windows as wide as the array. Data movement, integers and comparisons
count nothing.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from dense_jax.costs.hlo_text import Computation, HloError, Instruction, Shape

ARITHMETIC = frozenset({
    "abs", "add", "ceil", "clamp", "divide", "floor", "maximum", "minimum", "multiply", "negate",
    "remainder", "round-nearest-afz", "round-nearest-even", "sign", "subtract",
})
TRANSCENDENTAL = frozenset({
    "atan2", "cbrt", "cosine", "erf", "exponential", "exponential-minus-one", "log",
    "log-plus-one", "logistic", "power", "rsqrt", "sine", "sqrt", "tan", "tanh",
})
# What a kernel's author says: jax's own estimate, or the scope of ops/kernel_cost.py.
_COST_ESTIMATE = re.compile(r'"cost_estimate":\{([^}]*)\}')
_COST_SCOPE = re.compile(r"kernel_cost\[([^\]]*)\]")
_FIELD = re.compile(r'"?(\w+)"?[:=]"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# Beginnings of the names of custom calls of cuBLAS and cuDNN.
_LIBRARIES = ("__cublas$", "__cudnn$")
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_SCORES = re.compile(r'"intermediate_tensor_shape":.*?"dimensions": *\[([^\]]*)\]')
_WINDOW = re.compile(r'"sliding_window_length": *(\d+)')


@dataclasses.dataclass(frozen=True)
class Operations:
  """Numbers of floating-point operations.

  Attributes:
    flops: all operations but transcendental functions.
    matmul_flops: the part of `flops` in dots and convolutions.
    transcendentals: evaluations of exp, log, tanh, rsqrt and similar functions.
  """

  flops: float = 0
  matmul_flops: float = 0
  transcendentals: float = 0


def operations(computation: Computation, instruction: Instruction) -> Operations:
  """Returns the operations of one instruction, without those of computations that it calls.

  Raises:
    HloError: a convolution has an unknown form.
  """
  opcode, shape = instruction.opcode, instruction.shape
  if opcode in ("dot", "convolution"):
    count = _dot if opcode == "dot" else _convolution
    flops = count(computation, instruction)
    return Operations(flops, flops)
  if opcode in TRANSCENDENTAL:
    return Operations(transcendentals=shape.elements)
  if opcode in ARITHMETIC:
    return Operations(shape.elements if shape.is_float else 0)
  operands = [computation.instructions[name].shape for name in instruction.operands]
  if opcode in ("reduce", "reduce-window"):  # Operands are n arrays and n initial values.
    return Operations(_floats(operands[: len(operands) // 2]))
  if opcode == "scatter":  # n arrays, the indices, n updates.
    return Operations(_floats(operands[len(operands) // 2 + 1 :]))
  if opcode == "fft":
    return Operations(_fft(operands[0], shape, instruction))
  if is_library_call(instruction):
    flops = _library_flops(computation, instruction)
    return Operations(flops, flops)
  if estimate := cost_estimate(instruction):
    return Operations(
        estimate.get("flops", 0), estimate.get("matmul_flops", 0),
        estimate.get("transcendentals", 0),
    )
  return Operations()


def cost_estimate(instruction: Instruction) -> dict[str, int]:
  """Returns what the author of a Pallas kernel says about its custom call, or {}."""
  if instruction.opcode != "custom-call":
    return {}
  found = _COST_SCOPE.search(instruction.op_name) or _COST_ESTIMATE.search(instruction.attributes)
  return {name: int(value) for name, value in _FIELD.findall(found[1])} if found else {}


def target(instruction: Instruction) -> str:
  """Returns the name of what a custom call calls; "" for another instruction."""
  found = _TARGET.search(instruction.attributes)
  return found[1] if found else ""


def is_library_call(instruction: Instruction) -> bool:
  """Returns whether an instruction is a matmul, convolution or attention of cuBLAS or cuDNN."""
  return instruction.opcode == "custom-call" and target(instruction).startswith(_LIBRARIES)


def _library_flops(computation: Computation, instruction: Instruction) -> float:
  """Returns the operations of a call of cuBLAS or cuDNN.

  Raises:
    HloError: the call is of an unknown kind.
  """
  name = target(instruction)
  result = instruction.shape.leaves[0]
  if name.startswith("__cublas$") and (found := _CONTRACTED.search(instruction.attributes)):
    left = computation.operand(instruction, 0).shape
    contracted = math.prod(left.dims[axis] for axis in _integers(found[1]))
    return _multiply_add(result) * result.elements * contracted
  if name.startswith("__cudnn$conv"):
    return _convolution(computation, dataclasses.replace(instruction, shape=result))
  if name.startswith("__cudnn$fmha") and (found := _SCORES.search(instruction.attributes)):
    # Attention's matmuls by its scores [B, N, T, S]: two forward, five backward. Scores that a
    # causal mask or a window hides are not computed.
    *batch, queries, keys = _integers(found[1])
    window = _WINDOW.search(instruction.attributes)
    if window and int(window[1]):
      keys = min(keys, int(window[1]))
    pairs = queries * keys / (2 if '"CAUSAL"' in instruction.attributes and keys == queries else 1)
    size = computation.operand(instruction, 0).shape.dims[-1]
    return 2 * (5 if "Backward" in name else 2) * math.prod(batch) * pairs * size
  raise HloError(f"{instruction.name} calls {name}, whose operations are not known")


def _floats(shapes: list[Shape]) -> int:
  return sum(shape.elements for shape in shapes if shape.is_float)


def _integers(text: str) -> list[int]:
  return [int(part.strip(' "')) for part in text.split(",") if part]


def _multiply_add(shape: Shape) -> int:
  """Returns the operations of a multiplication and addition; a complex one takes four real ones."""
  return 8 if shape.dtype.startswith("c") else 2


def _dot(computation: Computation, instruction: Instruction) -> float:
  left = computation.operand(instruction, 0).shape
  axes = _integers(instruction.attribute("lhs_contracting_dims"))
  contracted = math.prod(left.dims[axis] for axis in axes)
  return _multiply_add(instruction.shape) * instruction.shape.elements * contracted


def _fft(operand: Shape, result: Shape, instruction: Instruction) -> float:
  """Returns 5 n log2 n for a complex transform of length n, and half of that for a real one."""
  lengths = math.prod(_integers(instruction.attribute("fft_length")))
  elements = max(operand.elements, result.elements)
  real = instruction.attribute("fft_type") in ("RFFT", "IRFFT")
  return 5 * elements * math.log2(lengths) / (2 if real else 1)


@dataclasses.dataclass(frozen=True)
class _Axis:
  """One axis of a window: the number of its taps, and how they step over the input."""

  size: int
  stride: int = 1
  pad: int = 0
  lhs_dilate: int = 1
  rhs_dilate: int = 1


def _window(instruction: Instruction, axes: int) -> list[_Axis]:
  """Parses a window such as `window={size=3x1 stride=2x1 pad=1_1x0_0 lhs_dilate=1x2}`."""
  fields = dict(part.split("=") for part in instruction.attribute("window").split())
  columns = {
      name: [int(part.split("_")[0]) for part in fields[name].split("x")]
      for name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
      if name in fields
  }
  if any(len(column) != axes for column in columns.values()):
    raise HloError(f"{instruction.name} has a window of other axes: {fields}")
  return [
      _Axis(**{name: column[axis] for name, column in columns.items()}) for axis in range(axes)
  ]


@functools.cache
def _taps(axis: _Axis, inputs: int, outputs: int) -> int:
  """Counts the pairs of an output and a tap for which the tap meets an input.

  The other pairs fall into padding or into the gaps of a dilated input, and cost nothing. The
  TPU compiler writes a batched matmul as a convolution in which nearly all pairs do; counting
  those would overstate the matmul by the size of the batch.
  """
  tap_K1 = np.arange(axis.size, dtype=np.int64)[:, None] * axis.rhs_dilate
  total = 0
  for begin in range(0, outputs, 4096):  # In parts, because long convolutions have many pairs.
    output_1O = np.arange(begin, min(begin + 4096, outputs), dtype=np.int64)[None]
    at_KO = output_1O * axis.stride - axis.pad + tap_K1
    inside_KO = (at_KO >= 0) & (at_KO <= (inputs - 1) * axis.lhs_dilate)
    total += int(np.count_nonzero(inside_KO & (at_KO % axis.lhs_dilate == 0)))
  return total


def _convolution(computation: Computation, instruction: Instruction) -> float:
  left, right = (computation.operand(instruction, index).shape for index in (0, 1))
  labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
  if not labels:
    raise HloError(f"{instruction.name} has no dim_labels that are understood")
  spatial = sorted(set(labels[1]) - set("bf"))
  pairs = 1
  for label, axis in zip(spatial, _window(instruction, len(spatial)), strict=True):
    inputs = left.dims[labels[1].index(label)]
    outputs = instruction.shape.dims[labels[3].index(label)]
    pairs *= _taps(axis, inputs, outputs)
  batch = left.dims[labels[1].index("b")] // int(instruction.attribute("batch_group_count") or 1)
  # The kernel's "i" dimension has the input features of one group only.
  features = right.dims[labels[2].index("i")] * right.dims[labels[2].index("o")]
  return _multiply_add(instruction.shape) * batch * features * pairs

