"""`KernelDiagonal`: diagonal states by a kernel that computes reads and epilogue in one pass."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import jax

from dense_jax.ops import partition
from dense_jax.ops.diagonal import gpu, tpu
from dense_jax.ops.diagonal.kernel_inputs import Source
from dense_jax.ops.diagonal.sequence import DiagonalSequence
from dense_jax.ops.diagonal.step_sizes import StepSizes
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import KernelRecurrence, Read, gate_value
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelDiagonal(KernelRecurrence, DiagonalSequence):
  """Computes a layer's own and its sources' reads, and what follows them, in one kernel.

  The base class of the platforms' classes, which give the kernel: `tpu.selective_finish`, or
  another function with its arguments.
  """

  kernel: ClassVar[Callable[..., tuple[Array, Array]]]
  interpret: ClassVar[bool] = False

  def _joint(
      self, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    sources = [self._asked(query, None)]
    for read in reads:
      other = cast(KernelDiagonal, read.recurrence)
      sources.append(other._asked(read.query, gate_value(read.gate)))
    if epilogue.x is self.x_BTE:  # The kernel then reads one array once.
      epilogue = dataclasses.replace(epilogue, x=None)
    valid_BT = self.dt.valid_BT if isinstance(self.dt, StepSizes) else None
    channels, by_row = partition.by_row(None, WIDTH_AXIS), partition.by_row()
    y_BTE, final_BNE = partition.over_mesh(
        functools.partial(type(self).kernel, chunk=self.chunk, interpret=self.interpret),
        lambda _: (
            list(map(_source_specs, sources)), partition.of_epilogue(epilogue), by_row, by_row
        ),
        (channels, channels), sources, epilogue, self.resets_BT, valid_BT,
    )
    return Output(y_BTE, None), final_BNE

  def _asked(self, c_BTN: Array, gate: Array | None) -> Source:
    """Returns this recurrence with a query and a gate, as the kernel's input."""
    steps = self.dt
    dt, bias_E = (
        (steps.before_softplus(), steps.bias_E) if isinstance(steps, StepSizes) else (steps, None)
    )
    if gate is not None:
      gate = gate.reshape(self.x_BTE.shape)
    return Source(
        dt, bias_E, self.a_NE, self.x_BTE, self.b_BTN, c_BTN, gate, self.before_first()
    )


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


def _source_specs(source: Source) -> Any:
  """Returns the source with specs for its arrays."""
  channels, by_row = partition.by_row(None, WIDTH_AXIS), partition.by_row()
  return Source(
      channels, partition.unless_none(source.bias_E, partition.split(WIDTH_AXIS)),
      partition.split(None, WIDTH_AXIS), channels, by_row, by_row,
      partition.unless_none(source.gate_BTE, channels), channels,
  )
