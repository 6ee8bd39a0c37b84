"""Determines how often each loop of a compiled program runs.

XLA annotates a loop with its trip count if it knows that (`known_trip_count`), but not every
compiler keeps the annotation. Without it, the count is derived from the text: the condition
compares an element of the loop's carry with a bound, the body adds a constant to that element,
and its initial value is a constant. Bounds and initial values may be passed in through outer
loops, fusions and calls.
"""

import dataclasses
import re

from dense_jax.costs.hlo_text import (
    Computation,
    HloError,
    Instruction,
    Module,
    OpenLoopError,
)

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Operations that change neither the value of a scalar nor the elements of a tuple.
_IDENTITIES = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")
_CALLS = ("fusion", "call")
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}


@dataclasses.dataclass(frozen=True)
class Frame:
  """A computation together with the place that it is called from.

  Attributes:
    computation: the computation that is called.
    caller: the frame that calls it; None for the entry computation.
    arguments: the names of the caller's instructions that are passed as its parameters.
    loop: the `while` instruction whose body or condition it is; None for other calls.
  """

  computation: Computation
  caller: "Frame | None" = None
  arguments: tuple[str, ...] = ()
  loop: Instruction | None = None


# The number `offset`, or, if `element` is given, that element of the loop's carry plus `offset`.
@dataclasses.dataclass(frozen=True)
class _Number:
  offset: int
  element: int | None = None


def is_known(loop: Instruction) -> bool:
  """Returns whether the compiler says how often a loop runs."""
  return bool(_KNOWN.search(loop.attributes))


def trip_count(module: Module, frame: Frame, loop: Instruction) -> int:
  """Returns how often the body of a loop runs.

  Args:
    module: the program.
    frame: the computation that contains the loop, and where it is called from.
    loop: a `while` instruction of that computation.

  Raises:
    OpenLoopError: the text does not determine the count.
  """
  known = _KNOWN.search(loop.attributes)
  if known:
    return int(known[1])
  try:
    count = _count(_Reader(module), frame, loop)
  except HloError as error:
    raise OpenLoopError(f"the trips of loop {loop.name} cannot be told: {error}") from error
  if count is None:
    raise OpenLoopError(f"the trips of loop {loop.name} cannot be told from its condition")
  return count


def _count(reader: "_Reader", frame: Frame, loop: Instruction) -> int | None:
  body = reader.enter(frame, loop, "body")
  left, right, direction = reader.comparison(reader.enter(frame, loop, "condition"))
  if left.element is None or reader.invariant(body, left.element):
    left, right, direction = right, left, _FLIPPED[direction]
  if left.element is None:
    return None
  begin = reader.element(frame, loop.operands[0], left.element, None)
  after = reader.element(body, body.computation.root, left.element, body)
  if right.element is not None and reader.invariant(body, right.element):
    bound = reader.element(frame, loop.operands[0], right.element, None)
    right = _Number(bound.offset + right.offset)
  if after.element != left.element or right.element is not None:
    return None
  return _steps(begin.offset + left.offset, after.offset, right.offset, direction)


def _steps(first: int, step: int, bound: int, direction: str) -> int | None:
  """Returns the first n >= 0 for which `first + n * step` does not compare with the bound."""
  if direction in ("GT", "GE"):
    first, step, bound = -first, -step, -bound
  distance = bound - first + (direction in ("LE", "GE"))
  if direction == "NE":
    return distance // step if step and distance % step == 0 and distance // step >= 0 else None
  if direction == "EQ" or (step <= 0 and distance > 0):
    return None
  return max(0, -(-distance // step)) if distance > 0 else 0


class _Reader:
  """Finds the values of scalars by following them through a program's text."""

  def __init__(self, module: Module) -> None:
    self._module = module

  def comparison(self, frame: Frame) -> tuple[_Number, _Number, str]:
    """Returns both sides of the comparison that a loop's condition makes, and its direction."""
    inner, name = frame, frame.computation.root
    while (instruction := inner.computation.instructions[name]).opcode in (*_CALLS, *_IDENTITIES):
      if instruction.opcode in _CALLS:
        inner = self.enter(inner, instruction)
        name = inner.computation.root
      else:
        name = instruction.operands[0]
    if instruction.opcode != "compare":
      raise HloError(f"{frame.computation.name} compares no two numbers")
    left, right = (self.number(inner, operand, frame) for operand in instruction.operands)
    return left, right, instruction.attribute("direction")

  def invariant(self, body: Frame, index: int) -> bool:
    """Returns whether the body leaves element `index` of the loop's carry unchanged."""
    try:
      return self.element(body, body.computation.root, index, body) == _Number(0, index)
    except HloError:
      return False

  def number(self, frame: Frame, name: str, loop: Frame | None) -> _Number:
    """Returns the value of the scalar instruction `name`; elements of `loop`'s carry stay symbols.

    Raises:
      HloError: it is computed by anything but constants and additions.
    """
    instruction = frame.computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
      return _Number(int(instruction.argument))
    if opcode in _IDENTITIES:
      return self.number(frame, operands[0], loop)
    if opcode == "parameter" and frame.caller and not frame.loop:
      return self.number(frame.caller, frame.arguments[int(instruction.argument)], loop)
    if opcode == "get-tuple-element":
      return self.element(frame, operands[0], int(instruction.attribute("index")), loop)
    if opcode in _CALLS:
      inner = self.enter(frame, instruction)
      return self.number(inner, inner.computation.root, loop)
    if opcode in ("add", "subtract"):
      left, right = (self.number(frame, operand, loop) for operand in operands)
      sign = 1 if opcode == "add" else -1
      if right.element is None:
        return _Number(left.offset + sign * right.offset, left.element)
      if left.element is None and sign == 1:
        return _Number(left.offset + right.offset, right.element)
    raise HloError(f"the value of {name}, {opcode}, in {frame.computation.name} cannot be told")

  def element(self, frame: Frame, name: str, index: int, loop: Frame | None) -> _Number:
    """Returns the value of an element of the tuple instruction `name`; see `number`."""
    instruction = frame.computation.instructions[name]
    opcode = instruction.opcode
    if opcode == "tuple":
      return self.number(frame, instruction.operands[index], loop)
    if opcode in _IDENTITIES:
      return self.element(frame, instruction.operands[0], index, loop)
    if opcode in _CALLS:
      inner = self.enter(frame, instruction)
      return self.element(inner, inner.computation.root, index, loop)
    if opcode == "while":
      body = self.enter(frame, instruction, "body")
      if self.invariant(body, index):
        return self.element(frame, instruction.operands[0], index, loop)
    if opcode == "parameter" and frame is loop:
      return _Number(0, index)
    if opcode == "parameter" and frame.caller and self._passes(frame, index):
      argument = frame.arguments[int(instruction.argument)]
      return self.element(frame.caller, argument, index, loop)
    raise HloError(f"element {index} of {name}, {opcode}, cannot be told")

  def _passes(self, frame: Frame, index: int) -> bool:
    """Returns whether element `index` of a frame's parameter is that of the argument, always."""
    if frame.loop is None or frame.caller is None:
      return True
    return self.invariant(self.enter(frame.caller, frame.loop, "body"), index)

  def enter(self, frame: Frame, instruction: Instruction, attribute: str = "") -> Frame:
    """Calls the function `enter` with this reader's module."""
    return enter(self._module, frame, instruction, attribute)


def enter(module: Module, frame: Frame, instruction: Instruction, attribute: str = "") -> Frame:
  """Returns the frame of the computation that an instruction of `frame` calls.

  Args:
    module: the program.
    frame: the computation that contains the instruction.
    instruction: a fusion, a call or a loop.
    attribute: the attribute that names the callee, such as "body"; "" for a fusion or a call.
  """
  names = instruction.called(*((attribute,) if attribute else ("calls", "to_apply")))
  loop = instruction if instruction.opcode == "while" else None
  return Frame(module.computations[names[0]], frame, instruction.operands, loop)
