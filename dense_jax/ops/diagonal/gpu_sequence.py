"""Diagonal states by GPU kernels: a layer's own and its sources' reads, and what follows them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from dense_jax.ops import partition
from dense_jax.ops.diagonal.gpu import selective_finish
from dense_jax.ops.diagonal.gpu_kernels import Source
from dense_jax.ops.diagonal.sequence import DiagonalSequence
from dense_jax.ops.diagonal.step_sizes import StepSizes
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import Read, add_reads
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GpuDiagonal(DiagonalSequence):
  """Runs the kernels of `dense_jax.ops.diagonal.gpu`, compiled for a GPU."""

  interpret: ClassVar[bool] = False

  def _scan(self, c_BTN: Array) -> tuple[Array, Array]:
    return self.run(c_BTN)

  def run(self, query: Array, reads: Sequence[Read] = ()) -> tuple[Array, Array]:
    """See `Recurrence`: c_BTN -> y_BTE, h_BNE."""
    output, final_BNE = self.finish(query, reads, Epilogue())
    return output.y, final_BNE

  def finish(
      self, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    """See `Recurrence`: c_BTN -> y_BTE, h_BNE.

    One kernel computes the own read, all `reads` and the epilogue, if each of the reads is of a
    `GpuDiagonal` without a function; otherwise they are added one after the other.
    """
    if any(not isinstance(r.recurrence, GpuDiagonal) or r.function is not None for r in reads):
      y_BTE, final_BNE = self.run(query)
      return epilogue(add_reads(y_BTE, reads)), final_BNE
    sources = [self._asked(query, None)]
    for read in reads:
      sources.append(cast(GpuDiagonal, read.recurrence)._asked(read.query, read.gate))
    if epilogue.x is self.x_BTE:  # The kernel then reads one array once.
      epilogue = dataclasses.replace(epilogue, x=None)
    valid_BT = self.dt.valid_BT if isinstance(self.dt, StepSizes) else None
    channels = partition.by_row(None, WIDTH_AXIS)
    y_BTE, final_BNE = partition.over_mesh(
        functools.partial(_finish, chunk=self.chunk, interpret=self.interpret), _specs,
        (channels, channels), [*sources, epilogue, valid_BT], self.resets_BT,
    )
    return Output(y_BTE, None), final_BNE

  def _asked(self, c_BTN: Array, gate: Array | None) -> Source:
    """Returns this recurrence with a query and a gate, as the kernel's input."""
    dt, bias_E = self.dt, None
    if isinstance(dt, StepSizes):
      dt, bias_E = dt.before_softplus(), dt.bias_E
    if gate is not None:
      gate = gate.reshape(self.x_BTE.shape)
    return Source(
        dt, bias_E, self.a_NE, self.x_BTE, self.b_BTN, c_BTN, gate, self.before_first()
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedGpuDiagonal(GpuDiagonal):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


def _finish(
    arguments: Sequence[Any], resets_BT: Array | None, *, chunk: int, interpret: bool
) -> tuple[Array, Array]:
  *sources, epilogue, valid_BT = arguments
  return selective_finish(
      sources, epilogue, resets_BT, valid_BT, chunk=chunk, interpret=interpret
  )


def _specs(argument: Source | Epilogue | Array | None, width: int) -> Any:
  """Returns an argument of `_finish` with specs for its arrays; `width` is unused."""
  del width
  if not isinstance(argument, Source | Epilogue):
    return None if argument is None else partition.by_row()
  specs = {
      "a_NE": partition.split(None, WIDTH_AXIS), "b_BTN": partition.by_row(),
      "c_BTN": partition.by_row(), "bias_E": partition.split(WIDTH_AXIS),
      "skip": partition.split(WIDTH_AXIS),
  }
  names = (field.name for field in dataclasses.fields(argument))
  return dataclasses.replace(argument, **{
      name: specs.get(name, partition.by_row(None, WIDTH_AXIS))
      for name in names if isinstance(getattr(argument, name), jax.Array)
  })
