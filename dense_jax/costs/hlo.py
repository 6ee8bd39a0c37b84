"""What one run of a compiled program costs a chip: operations, bytes, collectives.

`compiled.cost_analysis()` counts a loop's body once, however often it runs. Here the
program's own text is read (`hlo_text.py`), and everything in a loop counts as often as the
loop runs (`hlo_loops.py`).

- Operations: see `hlo_ops.py`; a fusion's are those of the instructions in it.
- Bytes: what is read from and written to the device's main memory (HBM): operands and
  results of every instruction that is not fused into another. Buffers that the compiler
  keeps on the chip (memory space S(1), VMEM) are free, and so a copy between the two counts
  its one side in HBM. Padding of layouts and buffers that are read more than once by one
  instruction are not counted: it is the least that the program moves.
- Of a slice or gather, only what is sliced counts, inside fusions too. An update in place
  (dynamic-update-slice) counts the update: read and written; inside a fusion it is written
  only.
- Collectives: by kind, how many and their bytes: of the operand or the result, whichever
  is larger on a chip.
- A conditional counts its most expensive branch.
- A Pallas kernel counts what its author's `cost_estimate` says: its operations are no
  matmul's, as the estimate does not tell. A custom call without one moves its operands and
  results.
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
# Neither computes nor moves. Async pairs are counted at their start.
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
  """All collectives of one kind: how many run, and their bytes together."""

  kind: str
  count: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a program, or a part of it, costs a chip.

  Attributes:
    flops: floating-point operations, without transcendental functions.
    matmul_flops: those of them in dots and convolutions.
    transcendentals: values of exp, log, tanh, rsqrt and their like.
    bytes_accessed: of main memory.
    counts, sizes: collectives and their bytes, by kind.
  """

  flops: float = 0
  matmul_flops: float = 0
  transcendentals: float = 0
  bytes_accessed: float = 0
  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  sizes: Counter[str] = dataclasses.field(default_factory=Counter)

  @property
  def collectives(self) -> tuple[Collective, ...]:
    """By kind."""
    return tuple(Collective(k, self.counts[k], self.sizes[k]) for k in sorted(self.counts))


def program_cost(text: str, *, open_trips: int | None = None) -> Cost:
  """The cost of one run of the program in `compiled.as_text()`, on one chip.

  Args:
    text: the program.
    open_trips: how often loops run whose length is data; None makes them an error.

  Raises:
    OpenLoopError: the text does not tell how often a loop runs, and `open_trips` is None.
    HloError: the text has a form that is not understood.
  """
  module = parse_module(text)
  return _Walk(module, open_trips).cost(Frame(module.computations[module.entry]))


def _sum(parts: Iterable[tuple[Cost, int]]) -> Cost:
  """The sum of costs times numbers."""
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
  """Adds up a module, from its entry."""

  def __init__(self, module: Module, open_trips: int | None) -> None:
    self._module, self._open_trips = module, open_trips
    # Without what depends on the caller.
    self._fused = functools.cache(self._fused_cost)

  def cost(self, frame: Frame) -> Cost:
    """Of a computation that is not fused."""
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
      # The condition is asked once more than the body runs.
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
    """Of a fused computation: all but bytes."""
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
    """What a fusion moves: the slices of its operands that it uses, and its results."""
    total = self._written(inner, inner.root, _result(fusion))
    for operand, parameter in zip(fusion.operands, inner.parameters, strict=True):
      source = computation.instructions[operand].shape
      total += _in_main(source, self._read(inner, parameter))
    return total

  def _read(self, inner: Computation, value: Instruction) -> int:
    """Bytes of a fused computation's value that the instructions in it read."""
    total = 0
    for user in inner.users[value.name]:
      opcode = user.opcode
      if opcode in ("tuple", *_FREE - {"bitcast"}) or _is_middle_of_async(inner, user):
        continue  # It passes through.
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
    """Bytes of main memory that a fused computation's result writes; `shape` says where."""
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


# A collective that the TPU compiler spreads over several fusions appears in each of them.
# It is counted, and moves its bytes, where it starts.
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
  """An instruction's operations, and itself where it is a collective."""
  kind = instruction.opcode.removesuffix("-start")
  if kind in COLLECTIVES:
    if _is_middle_of_async(computation, instruction):
      return Cost()
    size = max(
        _result(instruction).bytes,
        sum(computation.instructions[name].shape.bytes for name in instruction.operands),
    )
    # On TPUs a reduce-scatter is a fusion of this name: an all-reduce and a slice.
    if computation.name.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    return Cost(counts=Counter({kind: 1}), sizes=Counter({kind: size}))
  found = hlo_ops.operations(computation, instruction)
  return Cost(found.flops, found.matmul_flops, found.transcendentals)


def _result(instruction: Instruction) -> Shape:
  """The result's shape; that of an async start is within a tuple."""
  opcode, shape = instruction.opcode, instruction.shape
  if opcode == "copy-start":
    return shape.parts[0]
  if opcode.endswith("-start") and opcode != "all-reduce-start":
    return shape.parts[1]
  return shape


def _in_main(shape: Shape, size: int) -> int:
  """`size` bytes of an array if it is in main memory, else 0."""
  return 0 if shape.space else size


def _moved(computation: Computation, instruction: Instruction) -> int:
  """Bytes that an instruction outside fusions reads from and writes to main memory."""
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
