"""Parses the text of a compiled XLA program into computations, instructions and shapes.

`compiled.as_text()` is the program of one chip after partitioning and fusion. This is the part
of its grammar that is needed here:

    %computation (parameters) -> shape {
      [ROOT ]%name = shape opcode(%operand, ...), attribute=value, ...
    }

A shape is a tuple of shapes, or an array such as `f32[2,64]{1,0:T(8,128)S(1)}`, where S is the
memory space; without S the array is in the device's main memory. Operands carry no shapes: they
are looked up by name.
"""

import dataclasses
import functools
import math
import re

BITS = {
    "pred": 8, "token": 0, "opaque": 0,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}
FLOATS = ("bf16", "f", "c")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# A kernel's attributes may have line breaks, after which a line may begin with braces too.
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_METADATA = re.compile(r"\bmetadata=\{[^{}]*\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SOURCE = re.compile(r'source_file="([^"]*)".*source_line=(\d+)')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
# A kernel's program in a custom call's configuration, which may have megabytes.
_PROGRAM = re.compile(r'(\bir = |"body":|\bmodule = )"[^"]*"')


class HloError(ValueError):
  """Raised if the text has a form that this package does not understand."""


class OpenLoopError(HloError):
  """Raised if the text does not determine how often a loop runs, e.g. if that depends on data."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of an array or of a tuple.

  Attributes:
    dtype: the dtype, such as "bf16"; "tuple" for tuples.
    dims: an array's dimensions.
    space: an array's memory space: 0 is the device's main memory (HBM), 1 is VMEM on the chip.
    parts: the shapes of a tuple's elements.
  """

  dtype: str
  dims: tuple[int, ...] = ()
  space: int = 0
  parts: tuple["Shape", ...] = ()

  @property
  def leaves(self) -> tuple["Shape", ...]:
    """The shapes of all arrays, in nested tuples too."""
    if self.dtype != "tuple":
      return (self,)
    return tuple(leaf for part in self.parts for leaf in part.leaves)

  @property
  def elements(self) -> int:
    """The number of elements of all arrays."""
    return sum(math.prod(leaf.dims) for leaf in self.leaves)

  @property
  def is_float(self) -> bool:
    """True for an array of real or complex floating-point numbers."""
    return self.dtype.startswith(FLOATS)

  @property
  def bytes(self) -> int:
    """The bytes of all arrays in any memory, without the padding of layouts."""
    return sum(-(-math.prod(leaf.dims) * _bits(leaf.dtype) // 8) for leaf in self.leaves)

  @property
  def main_bytes(self) -> int:
    """The bytes of the arrays that are in the device's main memory."""
    return sum(leaf.bytes for leaf in self.leaves if not leaf.space)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: its name, unique within its computation.
    opcode: the operation, such as "fusion".
    shape: the shape of the result.
    operands: the names of its operands, which are instructions of the same computation.
    argument: the text in parentheses, such as the value of a constant or a parameter's number.
    attributes: the text after the parentheses, without metadata.
    op_name: the jax operation that it comes from, with the scopes around it; "" if not known.
    frame: the number of its stack frame, a key of `Module.frames`; 0 if not known.
    source: the line that it comes from, FILE:LINE, where the text gives that; else "".
  """

  name: str
  opcode: str
  shape: Shape
  operands: tuple[str, ...]
  argument: str
  attributes: str
  op_name: str = ""
  frame: int = 0
  source: str = ""

  def attribute(self, name: str) -> str:
    """Returns the value of the attribute `name=value` without braces, or "" if there is none."""
    found = re.search(rf"(?:^|[,\s]){name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
    return found[1].strip("{}") if found else ""

  def called(self, *names: str) -> tuple[str, ...]:
    """Returns the names of the computations that the given attributes refer to."""
    return tuple(
        part.strip().removeprefix("%")
        for name in names
        for part in self.attribute(name).split(",")
        if part.strip()
    )


@dataclasses.dataclass(frozen=True)
class Computation:
  """A computation: its instructions by name, in order, and the name of its result."""

  name: str
  instructions: dict[str, Instruction]
  root: str

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    """The parameters, by number."""
    found = [i for i in self.instructions.values() if i.opcode == "parameter"]
    return sorted(found, key=lambda instruction: int(instruction.argument))

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """The users of each instruction: name -> instructions that have it as an operand."""
    users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return users

  def operand(self, instruction: Instruction, index: int) -> Instruction:
    """Returns the instruction that computes operand `index` of an instruction."""
    return self.instructions[instruction.operands[index]]


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: its computations by name.
    entry: the name of its entry computation.
    frames: the lines that led to an instruction, FILE:LINE, the innermost first, by the number
      of its stack frame; empty for a text without such tables.
  """

  computations: dict[str, Computation]
  entry: str
  frames: dict[int, tuple[str, ...]]


def parse_module(text: str) -> Module:
  """Parses `compiled.as_text()`.

  Raises:
    HloError: the text has no entry computation, or an instruction that cannot be parsed.
  """
  computations: dict[str, Computation] = {}
  entry, current = "", None
  lines = text.split("\n")  # Not splitlines(), for which other characters too end a line.
  said: list[str] = []  # The lines of the instruction that is being read.

  def add(computation: Computation) -> Computation:
    """Adds what was read to the computation; returns it, with a new root if that was one."""
    begin = _INSTRUCTION.match(said[0]) if said else None
    if begin is None:
      return computation
    instruction = _parse_instruction(begin[2], "\n".join(said)[begin.end() :])
    computation.instructions[instruction.name] = instruction
    said.clear()
    return dataclasses.replace(computation, root=instruction.name) if begin[1] else computation

  for line in lines:
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = Computation(header[2], {}, "")
        entry = header[2] if header[1] else entry
    elif _END.match(line):
      computations[current.name] = add(current)
      current = None
    elif _INSTRUCTION.match(line):
      current = add(current)
      said.append(line)
    elif said:
      said.append(line)
  if not entry:
    raise HloError("the text has no entry computation")
  return Module(computations, entry, _frames(lines))


_TABLES = ("FileNames", "FileLocations", "StackFrames")


def _frames(lines: list[str]) -> dict[int, tuple[str, ...]]:
  """Returns the lines of each stack frame, by the tables at the head of the text."""
  tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
  table: dict[int, str] = {}
  for line in lines:
    if line.startswith(("%", "ENTRY")):
      break
    number, _, rest = line.partition(" ")
    if number.isdigit():
      table[int(number)] = rest
    elif line:
      table = tables.get(line, {})
  files, locations, frames = (tables[name] for name in _TABLES)

  def fields(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}

  found: dict[int, tuple[str, ...]] = {}
  for index in sorted(frames):  # A frame comes after its parent.
    frame = fields(frames[index])
    place = fields(locations[frame["file_location_id"]])
    name = files[place["file_name_id"]].strip('"')
    # Parents are written as their number plus 1, so that 1 is none.
    found[index] = (f"{name}:{place['line']}", *found.get(frame["parent_frame_id"] - 1, ()))
  return found


def parse_shape(text: str) -> Shape:
  """Parses one shape, such as `f32[2,64]{1,0:T(8,128)S(1)}` or `(s32[], f32[3])`."""
  if text.startswith("("):
    parts, position = [], 1
    while text[position] != ")":
      end = _shape_end(text, position)
      parts.append(parse_shape(text[position:end]))
      position = end
      while text[position] in ", ":
        position += 1
    return Shape("tuple", parts=tuple(parts))
  array = _ARRAY.match(text)
  if not array:
    return Shape(re.split(r"[\[{]", text)[0])  # token[] and the like hold no numbers.
  space = _SPACE.search(array[3] or "")
  dims = tuple(int(dim.lstrip("<=")) for dim in array[2].split(",") if dim)
  return Shape(array[1], dims, int(space[1]) if space else 0)


def _parse_instruction(name: str, text: str) -> Instruction:
  text = re.sub(r"/\*.*?\*/", "", text)  # /*index=5*/
  end = _shape_end(text, 0)
  opcode = _OPCODE.match(text, end)
  if not opcode:
    raise HloError(f"no opcode in the instruction {name} = {text[:80]}")
  close = _closing(text, opcode.end() - 1)
  argument = text[opcode.end() : close]
  operands = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(argument))
  attributes = _PROGRAM.sub("", text[close + 1 :])
  metadata = _METADATA.search(attributes)
  said = metadata[0] if metadata else ""
  op_name, source, frame = (each.search(said) for each in (_OP_NAME, _SOURCE, _FRAME))
  return Instruction(
      name, opcode[1], parse_shape(text[:end]), operands, argument, _METADATA.sub("", attributes),
      op_name[1] if op_name else "",
      int(frame[1]) if frame else 0,
      f"{source[1]}:{source[2]}" if source else "",
  )


def _shape_end(text: str, begin: int) -> int:
  """Returns the index behind the shape that begins at index `begin`."""
  if text[begin] == "(":
    return _closing(text, begin) + 1
  array = _ARRAY.match(text, begin)
  if array:
    return array.end()
  plain = re.compile(r"\w+\[\]|\w+").match(text, begin)
  if not plain:
    raise HloError(f"no shape in {text[begin : begin + 80]}")
  return plain.end()


def _closing(text: str, begin: int) -> int:
  """Returns the index of the parenthesis that closes the one at index `begin`."""
  depth = 0
  for bracket in re.compile(r"[()]").finditer(text, begin):
    depth += 1 if bracket[0] == "(" else -1
    if not depth:
      return bracket.start()
  raise HloError(f"an open parenthesis in {text[begin : begin + 80]}")


def _bits(dtype: str) -> int:
  if dtype in BITS:
    return BITS[dtype]
  if dtype.startswith("f8"):
    return 8
  if dtype.startswith("f4"):
    return 4
  raise HloError(f"an array of unknown dtype {dtype}")
