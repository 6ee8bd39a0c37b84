"""`KernelDiagonal`: diagonal states by a kernel that computes reads and epilogue in one pass."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import jax

from dense_jax.ops import partition
from dense_jax.ops.diagonal import gpu, tpu
from dense_jax.ops.diagonal.kernel_inputs import LowRank, SelectiveFinish, Source, Wide
from dense_jax.ops.diagonal.sequence import DiagonalSequence
from dense_jax.ops.diagonal.step_sizes import StepSizes
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import KernelRecurrence, LowRankGate, Read, distinct_gates
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelDiagonal(KernelRecurrence, DiagonalSequence):
  """Computes a layer's own and its sources' reads, and what follows them, in one kernel.

  The base class of the platforms' classes, which give the kernel.
  """

  kernel: ClassVar[SelectiveFinish]
  interpret: ClassVar[bool] = False

  def _joint(
      self, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    gates, numbers = distinct_gates(reads)
    sources = [self._asked(query, None)]
    for read, number in zip(reads, numbers, strict=True):
      sources.append(cast(KernelDiagonal, read.recurrence)._asked(read.query, number))
    if epilogue.x is self.x_BTE:  # The kernel then reads one array once.
      epilogue = dataclasses.replace(epilogue, x=None)
    valid_BT = self.dt.valid_BT if isinstance(self.dt, StepSizes) else None
    given = list(map(self._given, gates))
    channels, by_row = partition.by_row(None, WIDTH_AXIS), partition.by_row()
    y_BTE, final_BNE = partition.over_mesh(
        functools.partial(type(self).kernel, chunk=self.chunk, interpret=self.interpret),
        lambda _: (
            list(map(_source_specs, sources)), list(map(_wide_specs, given)),
            partition.of_epilogue(epilogue), by_row, by_row,
        ),
        (channels, channels), sources, given, epilogue, self.resets_BT, valid_BT,
    )
    return Output(y_BTE, None), final_BNE

  def _asked(self, c_BTN: Array, gate: int | None) -> Source:
    """Returns this recurrence with a query and a gate, as the kernel's input."""
    dt: Wide
    if isinstance(self.dt, StepSizes):
      dt, bias_E = LowRank(self.dt.low_BTR, self.dt.kernel_RE), self.dt.bias_E
    else:
      dt, bias_E = self.dt, None
    return Source(
        dt, bias_E, self.a_NE, self.x_BTE, self.b_BTN, c_BTN, self.before_first(), gate
    )

  def _given(self, gate: Array | LowRankGate) -> Wide:
    """Returns a gate as the kernel's input."""
    if isinstance(gate, LowRankGate):
      return LowRank(gate.hidden_R, gate.up_RE)
    return gate.reshape(self.x_BTE.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TpuDiagonal(KernelDiagonal):
  """Runs the kernels of `dense_jax.ops.diagonal.tpu`."""

  kernel = staticmethod(tpu.selective_finish)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedTpuDiagonal(TpuDiagonal):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GpuDiagonal(KernelDiagonal):
  """Runs the kernels of `dense_jax.ops.diagonal.gpu`."""

  kernel = staticmethod(gpu.selective_finish)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedGpuDiagonal(GpuDiagonal):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


def _wide_specs(wide: Wide) -> Any:
  """Returns E numbers a token with specs for their arrays."""
  if not isinstance(wide, LowRank):
    return partition.by_row(None, WIDTH_AXIS)
  specs: Any = LowRank
  return specs(partition.by_row(), partition.split(None, WIDTH_AXIS))


def _source_specs(source: Source) -> Any:
  """Returns the source with specs for its arrays."""
  channels, by_row = partition.by_row(None, WIDTH_AXIS), partition.by_row()
  return Source(
      _wide_specs(source.dt), partition.unless_none(source.bias_E, partition.split(WIDTH_AXIS)),
      partition.split(None, WIDTH_AXIS), channels, by_row, by_row, channels, source.gate,
  )
