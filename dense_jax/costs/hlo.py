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
- A Pallas kernel counts what its author says (`dense_jax/ops/kernel_cost.py`), matmuls apart. One
  that has only jax's own `cost_estimate`, which GPUs' programs do not keep, counts no matmuls. A
  custom call without either counts the bytes of its operands and results.
- Launches: instructions outside fusions that run as kernels. Those of a GPU's step take a few
  microseconds each, whatever they do; on a TPU they mean little.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator

from dense_jax.costs import hlo_bytes, hlo_loops, hlo_ops
from dense_jax.costs.hlo_loops import Frame
from dense_jax.costs.hlo_text import (
  Computation,
  Instruction,
  Module,
  OpenLoopError,
  parse_module,
)


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
    launches: kernels that run.
    counts, sizes: the number and the bytes of collectives, by kind.
  """

  flops: float = 0
  matmul_flops: float = 0
  transcendentals: float = 0
  bytes_accessed: float = 0
  launches: float = 0
  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  sizes: Counter[str] = dataclasses.field(default_factory=Counter)

  @property
  def collectives(self) -> tuple[Collective, ...]:
    """The collectives, sorted by kind."""
    return tuple(Collective(k, self.counts[k], self.sizes[k]) for k in sorted(self.counts))


@dataclasses.dataclass(frozen=True)
class Item:
  """An instruction that is not fused into another one, where it is called from.

  Attributes:
    instruction: the instruction.
    lines: the lines of code that it comes from, FILE:LINE, the innermost first.
    op_name: the jax operation that it comes from, with the scopes around it; "" if not known.
    times: how often it runs.
    cost: what it costs each time.
  """

  instruction: Instruction
  lines: tuple[str, ...]
  op_name: str
  times: int
  cost: Cost


def program_items(text: str, *, open_trips: int | None = None) -> list[Item]:
  """Returns the instructions that one run of a compiled program executes on one chip.

  Args:
    text: the program, from `compiled.as_text()`.
    open_trips: the number of iterations assumed for loops whose length depends on data; None
      makes such a loop an error.

  Raises:
    OpenLoopError: the text does not determine how often a loop runs, and `open_trips` is None.
    HloError: the text has an unknown form.
  """
  module = parse_module(text)
  walk = _Walk(module, open_trips)
  return list(walk.items(Frame(module.computations[module.entry]), 1))


def total(items: Iterable[Item]) -> Cost:
  """Returns the cost of all runs of the instructions."""
  return _sum((item.cost, item.times) for item in items)


_NUMBERS = ("flops", "matmul_flops", "transcendentals", "bytes_accessed", "launches")


def _sum(parts: Iterable[tuple[Cost, int]]) -> Cost:
  """Returns the sum of cost * number over the pairs."""
  totals: Counter[str] = Counter()
  counts: Counter[str] = Counter()
  sizes: Counter[str] = Counter()
  for cost, times in parts:
    for name in _NUMBERS:
      totals[name] += getattr(cost, name) * times
    for kind in cost.counts:
      counts[kind] += cost.counts[kind] * times
      sizes[kind] += cost.sizes[kind] * times
  return Cost(**{name: totals[name] for name in _NUMBERS}, counts=counts, sizes=sizes)


class _Walk:
  """Finds the instructions that run, following calls and loops."""

  def __init__(self, module: Module, open_trips: int | None) -> None:
    self._module, self._open_trips = module, open_trips
    # Can be cached, because the operations of a fused computation do not depend on its caller.
    self._fused = functools.cache(self._fused_cost)

  def items(self, frame: Frame, times: int) -> Iterator[Item]:
    """Yields what `times` runs of a computation that is not fused execute."""
    for instruction in frame.computation.instructions.values():
      opcode = instruction.opcode
      if hlo_bytes.is_free(instruction):
        continue
      if opcode == "while":
        trips = self._trips(frame, instruction)
        yield from self._called(frame, instruction, times * trips, "body")
        # The condition is evaluated once more than the body runs. A GPU's compiler that knows how
        # often that is evaluates none.
        if not hlo_loops.is_known(instruction):
          yield from self._called(frame, instruction, times * (trips + 1), "condition")
      elif opcode == "conditional":
        branches = [list(self.items(each, times)) for each in self._branches(frame, instruction)]
        yield from max(branches, key=lambda items: _weight(total(items)))
      elif opcode in ("call", "call-start", "async-start"):
        yield from self._called(frame, instruction, times)
      else:
        yield self._item(frame.computation, instruction, times)

  def _called(
      self, frame: Frame, instruction: Instruction, times: int, attribute: str = ""
  ) -> Iterator[Item]:
    return self.items(hlo_loops.enter(self._module, frame, instruction, attribute), times)

  def _item(self, computation: Computation, instruction: Instruction, times: int) -> Item:
    """Returns an instruction that is no call; a fusion has the operations of those in it."""
    origin = self._origin(computation, instruction)
    if instruction.opcode in ("fusion", "fusion-start"):
      work = self._fused(instruction.called("calls")[0])
      moved = hlo_bytes.fusion_bytes(self._module, computation, instruction)
    else:
      work = _own_cost(computation, instruction)
      moved = hlo_bytes.moved_bytes(computation, instruction)
    cost = dataclasses.replace(work, bytes_accessed=moved, launches=1)
    lines = self._module.frames.get(origin.frame, (origin.source,) if origin.source else ())
    return Item(instruction, lines, instruction.op_name or origin.op_name, times, cost)

  def _origin(self, computation: Computation, instruction: Instruction) -> Instruction:
    """Returns the instruction that tells where in the code an instruction comes from.

    What the compiler adds says nothing: then it is the last instruction of a fusion, or else the
    first operand, that says something.
    """
    known = [instruction]
    for name in instruction.called("calls"):
      known += reversed(self._module.computations[name].instructions.values())
    known += [computation.instructions[name] for name in instruction.operands]
    told = (each for each in known if each.frame or each.source)
    return next(told, None) or next((each for each in known if each.op_name), instruction)

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


def _weight(cost: Cost) -> tuple[float, float]:
  return cost.flops, cost.bytes_accessed


def _own_cost(computation: Computation, instruction: Instruction) -> Cost:
  """Returns an instruction's operations, or its count and size if it is a collective."""
  kind = instruction.opcode.removesuffix("-start")
  if kind in hlo_bytes.COLLECTIVES:
    if hlo_bytes.is_middle_of_async(computation, instruction):
      return Cost()
    size = max(
        hlo_bytes.result_shape(instruction).bytes,
        sum(computation.instructions[name].shape.bytes for name in instruction.operands),
    )
    # On TPUs, a reduce-scatter is a fusion of this name that contains an all-reduce and a slice.
    if computation.name.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    return Cost(counts=Counter({kind: 1}), sizes=Counter({kind: size}))
  found = hlo_ops.operations(computation, instruction)
  return Cost(found.flops, found.matmul_flops, found.transcendentals)
