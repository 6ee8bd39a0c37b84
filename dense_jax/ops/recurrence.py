"""The interface between families and dense connections: `Recurrence` and `Read`.

A layer makes its recurrence from its input and runs it. A deeper layer reads the same recurrence
with a query of its own and gets y of equation (2), although no states are stored: a recurrence
holds its inputs, and each read computes the states again. Reading with another query instead of
storing states is what makes dense state connections affordable.

Letters: `dense_jax.types`. A query has the shape that the form of state defines, and a read has
the size of the layer's output, [..., E] or [..., H, P]. Leading axes are [B, T] for a sequence and
[B] for one token of decoding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, Self, overload, runtime_checkable

import jax
import jax.numpy as jnp

from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.types import Array, PyTree

FLOAT32 = jnp.dtype("float32")

StateMap = Callable[[Array, PyTree], Array]
"""Maps one token's states [B, ..., N], and that token's inputs, to states of the same shape."""


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a layer's states.

  Attributes:
    heads: H; 1 for diagonal states.
    groups: J, groups of heads that share keys; 1 for diagonal states.
    channels: P, or E for diagonal states.
    state_size: N.
    equal_decays: true if every layer of the model has the same decays.
  """

  heads: int
  groups: int
  channels: int
  state_size: int
  equal_decays: bool = False


class Recurrence(Protocol):
  """The states h of one layer, over a sequence or at one token: an immutable pytree.

  h_t = a_t h_{t-1} + u_t    (1)        y_t = C_t h_t    (2)
  """

  def run(self, query: Array, reads: Sequence["Read"] = ()) -> tuple[Array, Array]:
    """Runs the recurrence for the layer that owns it.

    Args:
      query: C of the layer itself.
      reads: gated reads of other layers' recurrences, which are added to the layer's own read.

    Returns:
      The sum of all reads, float32, and the state after the last token that is not padding,
      float32, to carry on from.
    """

  def finish(
      self, query: Array, reads: Sequence["Read"], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    """Runs the recurrence as `run` does, and what follows the read in its layer.

    Args:
      query: C of the layer itself.
      reads: gated reads of other layers' recurrences, which are added to the layer's own read.
      epilogue: what follows; an implementation may compute it in the same pass over memory.

    Returns:
      The epilogue of the sum of all reads, and the state after the last token, float32.
    """

  def read(self, query: Array) -> Array:
    """Computes y of equation (2) for any query, float32."""

  def read_mapped(self, query: Array, function: StateMap, inputs: PyTree) -> Array:
    """Computes y of equation (2) with `function(h, inputs)` in place of h, float32.

    Runs token by token in rematerialised chunks: exact for any function, but far slower than
    `read`.

    Args:
      query: as in `read`.
      function: maps the states of each token.
      inputs: further inputs of `function`, a tree of [B, T, ...] (in decoding [B, ...]); None
        means none.
    """

  def materialize(self) -> Array:
    """Computes the states of all tokens, N last; for tests and analysis, never for training.

    At padding they are undefined, as reads are there.
    """


@runtime_checkable
class TokenRecurrence(Recurrence, Protocol):
  """A recurrence at one token of decoding, which holds its state instead of its inputs."""

  def plus(self, h: Array) -> Self:
    """Returns the recurrence whose state is the sum of its own and h, N last."""


class ScannedRecurrence:
  """The base class of recurrences that compute a read and the last state together."""

  def _scan(self, query: Array) -> tuple[Array, Array]:
    """Computes y of equation (2) and the state after the last token; float32."""
    raise NotImplementedError

  def run(self, query: Array, reads: Sequence["Read"] = ()) -> tuple[Array, Array]:
    """See `Recurrence`; adds the reads one after the other."""
    y, final = self._scan(query)
    return add_reads(y, reads), final

  def finish(
      self, query: Array, reads: Sequence["Read"], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    """See `Recurrence`; the read is in memory before the epilogue begins."""
    y, final = self.run(query, reads)
    return epilogue(y), final

  def read(self, query: Array) -> Array:
    """See `Recurrence`."""
    return self._scan(query)[0]


class KernelRecurrence(ScannedRecurrence):
  """The base class of recurrences whose kernels compute reads and the epilogue together.

  The kernel takes the layer's own read and those of its sources, if each source is a recurrence of
  the same class and each read is one of the states themselves. Otherwise it computes the own read,
  the others are added one after the other, and the epilogue follows.
  """

  def _joint(
      self, query: Array, reads: Sequence["Read"], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    """Computes `finish` by the kernel; each of `reads` has a recurrence of this class."""
    raise NotImplementedError

  def _scan(self, query: Array) -> tuple[Array, Array]:
    return self.run(query)

  def run(self, query: Array, reads: Sequence["Read"] = ()) -> tuple[Array, Array]:
    """See `Recurrence`."""
    output, final = self.finish(query, reads, Epilogue())
    return output.y, final

  def finish(
      self, query: Array, reads: Sequence["Read"], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    """See `Recurrence`."""
    kind: type = type(self)
    if all(type(read.recurrence) is kind and read.function is None for read in reads):
      return self._joint(query, reads, epilogue)
    y, final = self.run(query)
    return epilogue(add_reads(y, reads)), final


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankGate:
  """The gate silu(hidden W), which a kernel can compute itself where it multiplies a read.

  Attributes:
    hidden_R: [..., R], in the model's dtype.
    up_RE: W, float32.
    matmul: computes hidden W, in hidden's dtype.
  """

  hidden_R: Array
  up_RE: Array
  matmul: Callable[[Array, Array], Array] = dataclasses.field(metadata={"static": True})

  def value(self) -> Array:
    """Returns the gate, [..., E] in the model's dtype."""
    return jax.nn.silu(self.matmul(self.hidden_R, self.up_RE))


ReadGate = Array | LowRankGate | None
"""The factor of a read; None means 1."""


@overload
def gate_value(gate: Array | LowRankGate) -> Array: ...
@overload
def gate_value(gate: ReadGate) -> Array | None: ...
def gate_value(gate: ReadGate) -> Array | None:
  """Returns a gate as an array; None means 1."""
  return gate.value() if isinstance(gate, LowRankGate) else gate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
  """A gated read of another layer's states: gate * (C f(h)).

  Attributes:
    recurrence: the other layer's recurrence.
    query: C.
    gate: an array of the read's size, in any shape, or a gate that is computed where it is
      needed; None means 1.
    inputs: the inputs of `function`.
    function: f, a callable pytree, needed if reading f(h) cannot be written as reading h with
      another query; None means the identity.
    dtype: the read is rounded to this dtype before the gate, and the backward pass keeps it so.
    recompute: true if the backward pass recomputes the read on its own instead of keeping its
      intermediate values.
  """

  recurrence: Recurrence
  query: Array
  gate: ReadGate = None
  inputs: PyTree = None
  function: StateMap | None = None
  dtype: jnp.dtype = dataclasses.field(default=FLOAT32, metadata={"static": True})
  recompute: bool = dataclasses.field(default=False, metadata={"static": True})

  def ungated(self) -> Array:
    """Returns the read before the gate, rounded to `dtype`."""
    if self.function is None:
      return self.recurrence.read(self.query).astype(self.dtype)
    y = self.recurrence.read_mapped(self.query, self.function, self.inputs)
    return y.astype(self.dtype)

  def value(self) -> Array:
    """Returns the gated read, float32."""
    if not self.recompute:
      return gated(gate_value(self.gate), self.ungated())
    y = jax.checkpoint(Read.ungated)(dataclasses.replace(self, gate=None))
    # The backward pass keeps the gate and the read in the model's dtype, not in float32.
    return jax.checkpoint(gated)(gate_value(self.gate), y)


def distinct_gates(
    reads: Sequence[Read],
) -> tuple[list[Array | LowRankGate], list[int | None]]:
  """Returns the gates of reads, a shared object once, and each read's index in that list."""
  gates: list[Array | LowRankGate] = []
  numbers: list[int | None] = []
  for read in reads:
    number = None
    if read.gate is not None:
      number = next((i for i, gate in enumerate(gates) if gate is read.gate), len(gates))
      if number == len(gates):
        gates.append(read.gate)
    numbers.append(number)
  return gates, numbers


def gated(gate: Array | None, y: Array) -> Array:
  """Multiplies a read by its gate, which may have any shape of the same size; float32."""
  y = y.astype(jnp.float32)
  return y if gate is None else gate.astype(jnp.float32).reshape(y.shape) * y


def gated_reads(own: Array, reads: Sequence[Read]) -> list[Array]:
  """Computes gated reads one after the other.

  Args:
    own: the layer's own read, float32.
    reads: the reads of other layers' recurrences.

  Returns:
    The layer's own read, then each gated read, all float32.
  """
  values = [own]
  for read in reads:
    if read.recompute:
      # The barrier keeps this order in the backward pass too, so that intermediate values of
      # only one read exist at a time.
      recurrence, values[-1] = jax.lax.optimization_barrier((read.recurrence, values[-1]))
      read = dataclasses.replace(read, recurrence=recurrence)
    values.append(read.value())
  return values


def add_reads(own: Array, reads: Sequence[Read]) -> Array:
  """Adds gated reads to the layer's own, one after the other."""
  own, *others = gated_reads(own, reads)
  return sum(others, start=own)
