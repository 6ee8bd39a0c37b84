"""Matrix states by GPU kernels: all reads and the epilogue of a layer in one pass over memory."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import jax

from dense_jax.errors import InputError
from dense_jax.ops import partition
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.matrix.gpu import Source, matrix_finish
from dense_jax.ops.matrix.sequence import MatrixSequence
from dense_jax.ops.recurrence import KernelRecurrence, LowRankGate, Read
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GpuMatrix(KernelRecurrence, MatrixSequence):
  """Runs the kernels of `dense_jax.ops.matrix.gpu`, compiled for a GPU.

  Raises `InputError` if the mesh would split a group of heads that share keys.
  """

  interpret: ClassVar[bool] = False

  def _joint(
      self, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    gates: list[Array | LowRankGate] = []
    sources = [self._asked(query, None)]
    for read in reads:
      # Sources may share a gate, which is then read once.
      number = None
      if read.gate is not None:
        number = next((i for i, gate in enumerate(gates) if gate is read.gate), len(gates))
        if number == len(gates):
          gates.append(read.gate)
      sources.append(cast(GpuMatrix, read.recurrence)._asked(read.query, number))
    if epilogue.x is self.v_BTE:  # The kernel need not read them twice.
      epilogue = dataclasses.replace(epilogue, x=None)
    values = [
        (gate.value() if isinstance(gate, LowRankGate) else gate).reshape(self.v_BTE.shape)
        for gate in gates
    ]
    heads = partition.by_row(None, WIDTH_AXIS)
    moments = partition.by_row(None, WIDTH_AXIS, None) if epilogue.moments else None
    output, final_BHPN = partition.over_mesh(
        functools.partial(matrix_finish, chunk=self.chunk, interpret=self.interpret),
        lambda width: (
            [_source_specs(source, width) for source in sources], [heads] * len(gates),
            partition.by_row(), _epilogue_specs(epilogue),
        ),
        (Output(heads, moments), partition.by_row(WIDTH_AXIS)),
        sources, values, self.resets_BT, epilogue,
    )
    shape = (*self.v_BTE.shape[:2], self.log_decay_BTH.shape[2], -1)
    return dataclasses.replace(output, y=output.y.reshape(shape)), final_BHPN

  def _asked(self, q_BTJN: Array, gate: int | None) -> Source:
    """Returns this recurrence with a query and a gate, as the kernel's input."""
    return Source(
        q_BTJN, self.k_BTJN, self.v_BTE, self.scale_BTH, self.log_decay_BTH, self.initial_BHPN,
        gate,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedGpuMatrix(GpuMatrix):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


def _source_specs(source: Source, width: int) -> Source:
  """Returns the source with specs for its arrays; `width` is the size of the mesh's width axis."""
  groups = source.k_BTJN.shape[2]
  if groups > 1 and groups % width:
    raise InputError(
        f"config.mesh.{WIDTH_AXIS} = {width} is not valid: with implementation=triton it has to "
        f"divide the {groups} groups of heads that share keys"
    )
  heads = partition.by_row(None, WIDTH_AXIS)
  keys = partition.by_row(None, WIDTH_AXIS if groups > 1 else None)
  shared = source.log_decay_BTH.shape[0] == 1
  return dataclasses.replace(
      source, q_BTJN=keys, k_BTJN=keys, v_BTE=heads,
      scale_BTH=_unless_none(source.scale_BTH, heads),
      log_decay_BTH=partition.split(None, None, WIDTH_AXIS) if shared else heads,
      initial_BHPN=_unless_none(source.initial_BHPN, partition.by_row(WIDTH_AXIS)),
  )


def _epilogue_specs(epilogue: Epilogue) -> Epilogue:
  """Returns the epilogue with specs for its arrays."""
  heads = partition.by_row(None, WIDTH_AXIS)
  return dataclasses.replace(
      epilogue, skip=_unless_none(epilogue.skip, partition.split(WIDTH_AXIS)),
      x=_unless_none(epilogue.x, heads), z=_unless_none(epilogue.z, heads),
  )


def _unless_none(x: Array | None, spec: Any) -> Any:
  return None if x is None else spec
