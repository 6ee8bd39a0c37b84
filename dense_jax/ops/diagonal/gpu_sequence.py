"""Diagonal states by GPU kernels: a layer's own and its sources' reads, and what follows them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import jax

from dense_jax.ops import partition
from dense_jax.ops.diagonal.gpu import selective_finish
from dense_jax.ops.diagonal.gpu_kernels import Source
from dense_jax.ops.diagonal.sequence import DiagonalSequence
from dense_jax.ops.diagonal.step_sizes import StepSizes
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import KernelRecurrence, Read
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GpuDiagonal(KernelRecurrence, DiagonalSequence):
  """Runs the kernels of `dense_jax.ops.diagonal.gpu`, compiled for a GPU."""

  interpret: ClassVar[bool] = False

  def _joint(
      self, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    sources = [self._asked(query, None)]
    for read in reads:
      sources.append(cast(GpuDiagonal, read.recurrence)._asked(read.query, read.gate))
    if epilogue.x is self.x_BTE:  # The kernel then reads one array once.
      epilogue = dataclasses.replace(epilogue, x=None)
    valid_BT = self.dt.valid_BT if isinstance(self.dt, StepSizes) else None
    channels, by_row = partition.by_row(None, WIDTH_AXIS), partition.by_row()
    y_BTE, final_BNE = partition.over_mesh(
        functools.partial(selective_finish, chunk=self.chunk, interpret=self.interpret),
        lambda _: (list(map(_specs, sources)), _specs(epilogue), by_row, by_row),
        (channels, channels), sources, epilogue, self.resets_BT, valid_BT,
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


def _specs(argument: Source | Epilogue) -> Any:
  """Returns the argument with specs for its arrays."""
  channels, by_row = partition.by_row(None, WIDTH_AXIS), partition.by_row()
  if isinstance(argument, Epilogue):
    return dataclasses.replace(
        argument,
        skip=None if argument.skip is None else partition.split(WIDTH_AXIS),
        x=None if argument.x is None else channels,
        z=None if argument.z is None else channels,
    )
  return Source(
      channels, None if argument.bias_E is None else partition.split(WIDTH_AXIS),
      partition.split(None, WIDTH_AXIS), channels, by_row, by_row,
      None if argument.gate_BTE is None else channels, channels,
  )
