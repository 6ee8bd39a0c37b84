"""Counts the bytes of main memory that single instructions and fusions of a program move.

See `hlo.py` for what is counted.
"""

from dense_jax.costs import hlo_ops
from dense_jax.costs.hlo_text import Computation, Instruction, Module, Shape

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)
# Instructions that neither compute nor move anything. Async pairs are counted at their start.
FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "partition-id", "replica-id", "opt-barrier", "add-dependency",
})
# Custom calls that only tell the compiler something.
_FREE_TARGETS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "ConcatBitcast", "GatherScatterIndicesBitpacked",
})
_SLICES = ("dynamic-slice", "slice", "gather")
# The TPU compiler can spread a collective over several fusions, and it appears in each of them.
# Only the one that starts it is counted.
_START = "AsyncCollectiveStart"
_DONE = "AsyncCollectiveDone"


def is_free(instruction: Instruction) -> bool:
  """Returns whether an instruction runs nothing, or is counted where it starts."""
  opcode = instruction.opcode
  return opcode in FREE or opcode.endswith(("-done", "-update")) or (
      opcode == "custom-call" and hlo_ops.target(instruction) in _FREE_TARGETS
  )


def fusion_bytes(module: Module, computation: Computation, fusion: Instruction) -> int:
  """Returns the bytes a fusion moves: those of its operands that it reads, and its results."""
  inner = module.computations[fusion.called("calls")[0]]
  total = _written(inner, inner.root, result_shape(fusion))
  for operand, parameter in zip(fusion.operands, inner.parameters, strict=True):
    source = computation.instructions[operand].shape
    total += _in_main(source, _read(module, inner, parameter))
  return total


def _read(module: Module, inner: Computation, value: Instruction) -> int:
  """Returns how many bytes of `value` the instructions of a fused computation read."""
  total = 0
  for user in inner.users[value.name]:
    opcode = user.opcode
    if opcode in ("tuple", *FREE - {"bitcast"}) or is_middle_of_async(inner, user):
      continue  # The value is passed on, not read.
    if opcode == "bitcast":
      total += _read(module, inner, user)
    elif opcode in _SLICES and user.operands.index(value.name) == 0:
      total += user.shape.bytes
    elif opcode == "dynamic-update-slice" and user.operands[0] == value.name:
      continue  # In place.
    elif opcode == "fusion":
      nested = module.computations[user.called("calls")[0]]
      for operand, parameter in zip(user.operands, nested.parameters, strict=True):
        total += _read(module, nested, parameter) if operand == value.name else 0
    else:
      return value.shape.bytes
  return min(total, value.shape.bytes)


def _written(inner: Computation, name: str, shape: Shape) -> int:
  """Returns the bytes of main memory that a fused computation writes for its result `name`.

  `shape` is the result's shape outside the fusion, which has the memory spaces.
  """
  instruction = inner.instructions[name]
  opcode = instruction.opcode
  if opcode == "tuple":
    return sum(
        _written(inner, operand, part)
        for operand, part in zip(instruction.operands, shape.parts, strict=True)
    )
  if opcode == "parameter" or is_middle_of_async(inner, instruction):
    return 0
  if hlo_ops.is_library_call(instruction):
    return _without_scratch(shape).main_bytes
  if opcode == "custom-call" and hlo_ops.target(instruction) == _START:
    return shape.parts[1].main_bytes
  if opcode == "bitcast":
    return _written(inner, instruction.operands[0], shape)
  if opcode == "dynamic-update-slice":
    update = inner.operand(instruction, 1).shape.bytes
    return _in_main(shape, update) + _written(inner, instruction.operands[0], shape)
  return shape.main_bytes


def is_middle_of_async(computation: Computation, instruction: Instruction) -> bool:
  """Returns whether an instruction goes on with a collective that another one has started."""
  if instruction.opcode == "custom-call":
    return hlo_ops.target(instruction) == _DONE
  if instruction.opcode not in COLLECTIVES:
    return False
  return "async_collective_fusion_config" in instruction.attributes and not any(
      hlo_ops.target(user) == _START
      for user in computation.users[instruction.name]
  )


def result_shape(instruction: Instruction) -> Shape:
  """Returns the shape of an instruction's result, which for an async start is part of a tuple."""
  opcode, shape = instruction.opcode, instruction.shape
  if opcode == "copy-start":
    return shape.parts[0]
  if opcode.endswith("-start") and opcode != "all-reduce-start":
    return shape.parts[1]
  return shape


def _without_scratch(shape: Shape) -> Shape:
  """Returns the result's shape of a call of cuBLAS or cuDNN: a tuple's last part is scratch."""
  return Shape("tuple", parts=shape.parts[:-1]) if len(shape.parts) > 1 else shape


def _in_main(shape: Shape, size: int) -> int:
  """Returns `size` if an array of this shape is in main memory, else 0."""
  return 0 if shape.space else size


def moved_bytes(computation: Computation, instruction: Instruction) -> int:
  """Returns the bytes of main memory that an instruction outside fusions reads and writes."""
  operands = [computation.instructions[name].shape for name in instruction.operands]
  opcode, result = instruction.opcode.removesuffix("-start"), result_shape(instruction)
  if opcode in _SLICES:
    return (
        _in_main(operands[0], result.bytes) + result.main_bytes
        + sum(shape.main_bytes for shape in operands[1:])
    )
  if opcode == "dynamic-update-slice":
    return operands[1].main_bytes + _in_main(result, operands[1].bytes)
  if opcode == "scatter":  # n arrays, the indices, n updates; rows are read and written.
    updates = operands[len(operands) // 2 + 1 :]
    rows = zip(result.leaves, updates, strict=True)
    return (
        sum(shape.main_bytes for shape in operands[len(operands) // 2 :])
        + 2 * sum(_in_main(array, update.bytes) for array, update in rows)
    )
  if opcode == "custom-call":
    estimate = hlo_ops.cost_estimate(instruction)
    if "bytes_accessed" in estimate:
      return estimate["bytes_accessed"]
    if hlo_ops.is_library_call(instruction):
      result = _without_scratch(result)
  return result.main_bytes + sum(shape.main_bytes for shape in operands)
