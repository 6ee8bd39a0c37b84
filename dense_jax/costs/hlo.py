"""Counts what one run of a compiled program costs a chip: operations, bytes, collectives.

`compiled.cost_analysis()` counts the body of a loop once, regardless of how often it runs. This
module reads the text of the program instead (`hlo_text.py`), and counts everything in a loop as
often as the loop runs (`hlo_loops.py`).

- Operations: see `hlo_ops.py`. A fusion has those of the instructions in it.
- Bytes: those read from and written to the device's main memory (HBM), which are the operands
  and results of every instruction that is not fused into another. Buffers that the compiler
  keeps on the chip (memory space S(1), VMEM) are free, so a copy between HBM and VMEM counts
  once. The padding of layouts, and repeated reads of a buffer by one instruction, are not
  counted: the result is the least that the program moves.
- Slices and gathers count only the elements that they take, inside fusions too. An update in
  place (dynamic-update-slice) counts the update as read and written; inside a fusion, as
  written only.
- Collectives: their number and bytes by kind. The bytes are those of the operand or the result
  on one chip, whichever is larger.
- A conditional counts its most expensive branch.
- A Pallas kernel counts the `cost_estimate` of its author. None of its operations count as
  matmul operations, because the estimate does not tell them apart. A custom call without an
  estimate counts the bytes of its operands and results.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable

from dense_jax.costs import hlo_loops, hlo_ops
from dense_jax.costs.hlo_loops import Frame
from dense_jax.costs.hlo_text import (
    Computation,
    Instruction,
    Module,
    OpenLoopError,
    Shape,
    parse_module,
)

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)
# Instructions that neither compute nor move anything. Async pairs are counted at their start.
_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "partition-id", "replica-id", "opt-barrier", "add-dependency",
})
# Custom calls that only tell the compiler something.
_FREE_TARGETS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "ConcatBitcast", "GatherScatterIndicesBitpacked",
})
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind: the number that run, and their total bytes."""

  kind: str
  count: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of a program, or of a part of it, on one chip.

  Attributes:
    flops: floating-point operations, without transcendental functions.
    matmul_flops: the part of `flops` in dots and convolutions.
    transcendentals: evaluations of exp, log, tanh, rsqrt and similar functions.
    bytes_accessed: bytes read from and written to main memory.
    counts, sizes: the number and the bytes of collectives, by kind.
  """

  flops: float = 0
  matmul_flops: float = 0
  transcendentals: float = 0
  bytes_accessed: float = 0
  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  sizes: Counter[str] = dataclasses.field(default_factory=Counter)

  @property
  def collectives(self) -> tuple[Collective, ...]:
    """The collectives, sorted by kind."""
    return tuple(Collective(k, self.counts[k], self.sizes[k]) for k in sorted(self.counts))


def program_cost(text: str, *, open_trips: int | None = None) -> Cost:
  """Returns the cost of one run of a compiled program on one chip.

  Args:
    text: the program, from `compiled.as_text()`.
    open_trips: the number of iterations assumed for loops whose length depends on data; None
      makes such a loop an error.

  Raises:
    OpenLoopError: the text does not determine how often a loop runs, and `open_trips` is None.
    HloError: the text has an unknown form.
  """
  module = parse_module(text)
  return _Walk(module, open_trips).cost(Frame(module.computations[module.entry]))


def _sum(parts: Iterable[tuple[Cost, int]]) -> Cost:
  """Returns the sum of cost * number over the pairs."""
  names = ("flops", "matmul_flops", "transcendentals", "bytes_accessed")
  totals: Counter[str] = Counter()
  counts: Counter[str] = Counter()
  sizes: Counter[str] = Counter()
  for cost, times in parts:
    for name in names:
      totals[name] += getattr(cost, name) * times
    for kind in cost.counts:
      counts[kind] += cost.counts[kind] * times
      sizes[kind] += cost.sizes[kind] * times
  return Cost(**{name: totals[name] for name in names}, counts=counts, sizes=sizes)


class _Walk:
  """Adds up the costs of a module's instructions, following calls and loops."""

  def __init__(self, module: Module, open_trips: int | None) -> None:
    self._module, self._open_trips = module, open_trips
    # Can be cached, because the operations of a fused computation do not depend on its caller.
    self._fused = functools.cache(self._fused_cost)

  def cost(self, frame: Frame) -> Cost:
    """Returns the cost of one run of a computation that is not fused."""
    return _sum(
        (self._instruction_cost(frame, instruction), 1)
        for instruction in frame.computation.instructions.values()
    )

  def _called(self, frame: Frame, instruction: Instruction, attribute: str = "") -> Cost:
    return self.cost(hlo_loops.enter(self._module, frame, instruction, attribute))

  def _instruction_cost(self, frame: Frame, instruction: Instruction) -> Cost:
    opcode, computation = instruction.opcode, frame.computation
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
      return Cost()
    if opcode == "while":
      trips = self._trips(frame, instruction)
      # The condition is evaluated once more than the body runs.
      return _sum([
          (self._called(frame, instruction, "body"), trips),
          (self._called(frame, instruction, "condition"), trips + 1),
      ])
    if opcode == "conditional":
      branches = [self.cost(branch) for branch in self._branches(frame, instruction)]
      return max(branches, key=lambda cost: (cost.flops, cost.bytes_accessed))
    if opcode in ("call", "call-start", "async-start"):
      return self._called(frame, instruction)
    if opcode in ("fusion", "fusion-start"):
      inner = self._module.computations[instruction.called("calls")[0]]
      moved = Cost(bytes_accessed=self._fusion_bytes(computation, instruction, inner))
      return _sum([(self._fused(inner.name), 1), (moved, 1)])
    moved = Cost(bytes_accessed=_moved(computation, instruction))
    return _sum([(_own_cost(computation, instruction), 1), (moved, 1)])

  def _trips(self, frame: Frame, loop: Instruction) -> int:
    try:
      return hlo_loops.trip_count(self._module, frame, loop)
    except OpenLoopError:
      if self._open_trips is None:
        raise
      return self._open_trips

  def _branches(self, frame: Frame, instruction: Instruction) -> list[Frame]:
    names = instruction.called("branch_computations") or instruction.called(
        "true_computation", "false_computation"
    )
    return [
        Frame(self._module.computations[name], frame, (operand,))
        for name, operand in zip(names, instruction.operands[1:], strict=True)
    ]

  def _fused_cost(self, name: str) -> Cost:
    """Returns the cost of a fused computation, without its bytes."""
    computation = self._module.computations[name]
    parts = []
    for instruction in computation.instructions.values():
      if instruction.opcode in ("fusion", "call"):
        for inner in instruction.called("calls", "to_apply"):
          parts.append((self._fused(inner), 1))
      else:
        parts.append((_own_cost(computation, instruction), 1))
    return _sum(parts)

  def _fusion_bytes(
      self, computation: Computation, fusion: Instruction, inner: Computation
  ) -> int:
    """Returns the bytes a fusion moves: those of its operands that it reads, and its results."""
    total = self._written(inner, inner.root, _result(fusion))
    for operand, parameter in zip(fusion.operands, inner.parameters, strict=True):
      source = computation.instructions[operand].shape
      total += _in_main(source, self._read(inner, parameter))
    return total

  def _read(self, inner: Computation, value: Instruction) -> int:
    """Returns how many bytes of `value` the instructions of a fused computation read."""
    total = 0
    for user in inner.users[value.name]:
      opcode = user.opcode
      if opcode in ("tuple", *_FREE - {"bitcast"}) or _is_middle_of_async(inner, user):
        continue  # The value is passed on, not read.
      if opcode == "bitcast":
        total += self._read(inner, user)
      elif opcode in _SLICES and user.operands.index(value.name) == 0:
        total += user.shape.bytes
      elif opcode == "dynamic-update-slice" and user.operands[0] == value.name:
        continue  # In place.
      elif opcode == "fusion":
        nested = self._module.computations[user.called("calls")[0]]
        for operand, parameter in zip(user.operands, nested.parameters, strict=True):
          total += self._read(nested, parameter) if operand == value.name else 0
      else:
        return value.shape.bytes
    return min(total, value.shape.bytes)

  def _written(self, inner: Computation, name: str, shape: Shape) -> int:
    """Returns the bytes of main memory that a fused computation writes for its result `name`.

    `shape` is the result's shape outside the fusion, which has the memory spaces.
    """
    instruction = inner.instructions[name]
    opcode = instruction.opcode
    if opcode == "tuple":
      return sum(
          self._written(inner, operand, part)
          for operand, part in zip(instruction.operands, shape.parts, strict=True)
      )
    if opcode == "parameter" or _is_middle_of_async(inner, instruction):
      return 0
    if opcode == "custom-call" and instruction.attribute("custom_call_target") == _START:
      return shape.parts[1].main_bytes
    if opcode == "bitcast":
      return self._written(inner, instruction.operands[0], shape)
    if opcode == "dynamic-update-slice":
      update = inner.operand(instruction, 1).shape.bytes
      return _in_main(shape, update) + self._written(inner, instruction.operands[0], shape)
    return shape.main_bytes


# The TPU compiler can spread a collective over several fusions, and it appears in each of them.
# Only the one that starts it is counted.
_START = '"AsyncCollectiveStart"'
_DONE = '"AsyncCollectiveDone"'


def _is_middle_of_async(computation: Computation, instruction: Instruction) -> bool:
  if instruction.opcode == "custom-call":
    return instruction.attribute("custom_call_target") == _DONE
  if instruction.opcode not in COLLECTIVES:
    return False
  return "async_collective_fusion_config" in instruction.attributes and not any(
      user.attribute("custom_call_target") == _START
      for user in computation.users[instruction.name]
  )


def _own_cost(computation: Computation, instruction: Instruction) -> Cost:
  """Returns an instruction's operations, or its count and size if it is a collective."""
  kind = instruction.opcode.removesuffix("-start")
  if kind in COLLECTIVES:
    if _is_middle_of_async(computation, instruction):
      return Cost()
    size = max(
        _result(instruction).bytes,
        sum(computation.instructions[name].shape.bytes for name in instruction.operands),
    )
    # On TPUs, a reduce-scatter is a fusion of this name that contains an all-reduce and a slice.
    if computation.name.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    return Cost(counts=Counter({kind: 1}), sizes=Counter({kind: size}))
  found = hlo_ops.operations(computation, instruction)
  return Cost(found.flops, found.matmul_flops, found.transcendentals)


def _result(instruction: Instruction) -> Shape:
  """Returns the shape of an instruction's result, which for an async start is part of a tuple."""
  opcode, shape = instruction.opcode, instruction.shape
  if opcode == "copy-start":
    return shape.parts[0]
  if opcode.endswith("-start") and opcode != "all-reduce-start":
    return shape.parts[1]
  return shape


def _in_main(shape: Shape, size: int) -> int:
  """Returns `size` if an array of this shape is in main memory, else 0."""
  return 0 if shape.space else size


def _moved(computation: Computation, instruction: Instruction) -> int:
  """Returns the bytes of main memory that an instruction outside fusions reads and writes."""
  operands = [computation.instructions[name].shape for name in instruction.operands]
  opcode, result = instruction.opcode.removesuffix("-start"), _result(instruction)
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
    if instruction.attribute("custom_call_target").strip('"') in _FREE_TARGETS:
      return 0
    estimate = hlo_ops.cost_estimate(instruction)
    if "bytes_accessed" in estimate:
      return estimate["bytes_accessed"]
  return result.main_bytes + sum(shape.main_bytes for shape in operands)
