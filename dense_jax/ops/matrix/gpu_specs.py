"""The block specs of the GPU kernels of matrix states."""

import dataclasses
from collections.abc import Callable, Sequence

from jax.experimental import pallas as pl

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.gpu_plan import Plan, Stream, div, rem
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array, PyTree

Gate = Array | LowRankGate
"""A gate of reads: [B, T, E], or low-rank with [B, T, R] and [R, E]."""


class Specs:
  """Block specs of a program: all tokens of a row, and a part of a head or a group of heads.

  Args:
    plan: the sizes.
    by_part: true if programs take parts of heads (grid: rows, parts of all heads), false if they
      take groups of heads (grid: rows, chunks, groups).
  """

  def __init__(self, plan: Plan, *, by_part: bool):
    parts, per_group = plan.parts, plan.per_group
    time, chunks, size = plan.time, plan.chunks, plan.state_size
    self._plan = plan
    index: Callable[[PyTree, PyTree], tuple[PyTree, ...]]
    heads: tuple[int | None, ...]
    numbers: tuple[int | None, ...]
    if by_part:
      width, channels, heads, numbers = plan.width, plan.width, (None,), (None, None)
      # The group, the head, the part of a head, and the part among those of all heads.
      index = lambda i, j: (div(i, parts * per_group), div(i, parts), rem(i, parts), i)  # noqa: E731
    else:
      width, channels, heads = per_group * plan.channels, plan.channels, (per_group,)
      numbers, index = (per_group, parts), lambda i, j: (j, j, 0, j)

    def spec(shape: tuple[int | None, ...], at: Callable[..., tuple[PyTree, ...]]) -> pl.BlockSpec:
      return pl.BlockSpec(shape, lambda b, i, j=0: at(b, i, *index(i, j)))

    # b: the row, t: the chunk, g: the group, h: the head, p: the part of a head, x: that of all.
    self.keys = spec((None, time, size), lambda b, t, g, h, p, x: (b, 0, g))
    self.scores = spec((None, None, time, plan.chunk), lambda b, t, g, h, p, x: (b, g, 0, 0))
    self.values = spec((None, time, width), lambda b, t, g, h, p, x: (b, 0, x))
    self.by_head = spec((None, *heads, time), lambda b, t, g, h, p, x: (b, h, 0))
    self.shared = spec((None, *heads, time), lambda b, t, g, h, p, x: (0, h, 0))
    self.count = spec((None, time), lambda b, t, g, h, p, x: (b, 0))
    self.skip = spec(
        (plan.heads if by_part else per_group,),
        lambda b, t, g, h, p, x: (0 if by_part else g,),
    )
    self.between = spec(
        (None, chunks, *heads, size, channels), lambda b, t, g, h, p, x: (b, 0, h, 0, p)
    )
    self.state = spec((None, *heads, channels, size), lambda b, t, g, h, p, x: (b, h, p, 0))
    self.moments = spec((None, *numbers, 2, time), lambda b, t, g, h, p, x: (b, h, p, 0, 0))
    self.d_moments = spec((None, *heads, 2, time), lambda b, t, g, h, p, x: (b, h, 0, 0))
    self.sums = spec((None, *numbers, time), lambda b, t, g, h, p, x: (b, h, p, 0))
    self.shares = lambda number: spec(
        (None, *numbers, number, time), lambda b, t, g, h, p, x: (b, h, p, 0, 0)
    )
    self.numbers = spec((None, None, *numbers), lambda b, t, g, h, p, x: (b, t, h, p))
    self.whole = spec(
        (None, None, *numbers, len(plan.pieces)), lambda b, t, g, h, p, x: (b, t, h, p, 0)
    )
    self._decays = self.shared if plan.shared_decay else self.by_head

  def stream(self, stream: Stream) -> Stream:
    """Returns the specs of a source."""
    return Stream(
        q_BTK=self.keys, k_BTK=self.keys, v_BTE=self.values,
        scale_BHT=if_given(stream.scale_BHT, self.by_head),
        high_BHT=self._decays, low_BHT=self._decays,
        initial_BHPN=if_given(stream.initial_BHPN, self.state), joins=stream.joins,
    )

  def recurrence(self, streams: Sequence[Stream]) -> tuple[Stream, ...]:
    """Returns the specs of a leader, and of what joins it."""
    leader, *members = map(self.stream, streams)
    return leader, *(member.values_alone() for member in members)

  def gate(self, gate: Gate) -> PyTree:
    """Returns the specs of a gate of a program that takes a part of a head."""
    if not isinstance(gate, LowRankGate):
      return self.values
    rank = gate.up_RE.shape[0]
    hidden: PyTree = pl.BlockSpec((None, self._plan.time, rank), lambda b, i: (b, 0, 0))
    up: PyTree = pl.BlockSpec((rank, self._plan.width), lambda b, i: (0, i))
    return dataclasses.replace(gate, hidden_R=hidden, up_RE=up)

  def epilogue(self, epilogue: Epilogue) -> Epilogue:
    """Returns the specs of an epilogue's arrays."""
    return dataclasses.replace(
        epilogue, skip=if_given(epilogue.skip, self.skip), x=if_given(epilogue.x, self.values),
        z=if_given(epilogue.z, self.values),
    )


def if_given(x: PyTree, spec: PyTree) -> PyTree:
  """Returns the spec of an array that may be absent."""
  return None if x is None else spec
