"""Diagonal states by TPU kernels: a layer's own and its sources' reads in one pass over memory."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from dense_jax.ops import partition
from dense_jax.ops.diagonal.sequence import DiagonalSequence
from dense_jax.ops.diagonal.tpu import selective_reads
from dense_jax.ops.diagonal.tpu_kernels import Diagonal
from dense_jax.ops.recurrence import Read, add_reads, gate_value
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelDiagonal(DiagonalSequence):
  """Runs the kernels of `dense_jax.ops.diagonal.tpu`, compiled for a TPU."""

  interpret: ClassVar[bool] = False

  def _scan(self, c_BTN: Array) -> tuple[Array, Array]:
    return self.run(c_BTN)

  def run(self, query: Array, reads: Sequence[Read] = ()) -> tuple[Array, Array]:
    """See `Recurrence`: c_BTN -> y_BTE, h_BNE.

    One kernel computes the own read and all `reads`, if each of those reads a `KernelDiagonal`
    without a function; otherwise they are added one after the other.
    """
    joint = all(isinstance(r.recurrence, KernelDiagonal) and r.function is None for r in reads)
    sources = [self._asked(query, None)]
    for read in reads if joint else ():
      other = cast(KernelDiagonal, read.recurrence)
      sources.append(other._asked(read.query, gate_value(read.gate)))
    channels = partition.by_row(None, WIDTH_AXIS)
    y_BTE, final_BNE = partition.over_mesh(
        functools.partial(selective_reads, chunk=self.chunk, interpret=self.interpret),
        lambda _: (list(map(_specs, sources)), partition.by_row()), (channels, channels),
        sources, self.resets_BT,
    )
    return y_BTE if joint else add_reads(y_BTE, reads), final_BNE

  def _asked(self, c_BTN: Array, gate: Array | None) -> Diagonal:
    """Returns this recurrence with a query and a gate, as the kernel's input."""
    if gate is not None:
      gate = gate.astype(jnp.float32).reshape(self.x_BTE.shape)
    return Diagonal(
        self.dt_BTE(), self.a_NE, self.x_BTE, self.b_BTN, c_BTN, gate, self.before_first()
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedDiagonal(KernelDiagonal):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


def _specs(source: Diagonal) -> Diagonal:
  """Returns the source with specs for its arrays."""
  channels = partition.by_row(None, WIDTH_AXIS)
  return dataclasses.replace(
      source, dt_BTE=channels, a_NE=partition.split(None, WIDTH_AXIS), x_BTE=channels,
      b_BTN=partition.by_row(), c_BTN=partition.by_row(), initial_BNE=channels,
      gate_BTE=None if source.gate_BTE is None else channels,
  )
