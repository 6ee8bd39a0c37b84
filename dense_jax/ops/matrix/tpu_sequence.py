"""Matrix states by TPU kernels: all reads and the epilogue of a layer in one pass over memory."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import jax

from dense_jax.errors import InputError
from dense_jax.ops import partition
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.matrix.sequence import MatrixSequence
from dense_jax.ops.matrix.tpu import matrix_reads
from dense_jax.ops.matrix.tpu_arrays import Matrix
from dense_jax.ops.recurrence import KernelRecurrence, LowRankGate, Read, ReadGate
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelMatrix(KernelRecurrence, MatrixSequence):
  """Runs the kernels of `dense_jax.ops.matrix.tpu`, compiled for a TPU.

  Raises `InputError` if the mesh would split a group of heads that share keys.
  """

  interpret: ClassVar[bool] = False

  def _joint(
      self, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    sources = [self._asked(query, None)]
    for read in reads:
      sources.append(cast(KernelMatrix, read.recurrence)._asked(read.query, read.gate))
    x, z = (
        None if x is None else x.reshape(self.v_BTE.shape) for x in (epilogue.x, epilogue.z)
    )
    # If x is the values themselves, the kernel need not read them twice.
    epilogue = dataclasses.replace(
        epilogue, x=None if epilogue.x is self.v_BTE else x, z=z
    )
    heads = partition.by_row(None, WIDTH_AXIS)
    moments = partition.by_row(None, WIDTH_AXIS, None) if epilogue.moments else None
    output, final_BHPN = partition.over_mesh(
        functools.partial(matrix_reads, chunk=self.chunk, interpret=self.interpret),
        lambda width: (
            [_source_specs(source, width) for source in sources], partition.by_row(),
            _epilogue_specs(epilogue),
        ),
        (Output(heads, moments), partition.by_row(WIDTH_AXIS)),
        sources, self.resets_BT, epilogue,
    )
    shape = (*self.v_BTE.shape[:2], self.log_decay_BTH.shape[2], -1)
    return dataclasses.replace(output, y=output.y.reshape(shape)), final_BHPN

  def _asked(self, q_BTJN: Array, gate: ReadGate) -> Matrix:
    """Returns this recurrence with a query and a gate, as the kernel's input."""
    if isinstance(gate, jax.Array):
      gate = gate.reshape(self.v_BTE.shape)
    return Matrix(
        q_BTJN, self.k_BTJN, self.v_BTE, self.scale_BTH, self.log_decay_BTH, gate,
        self.initial_BHPN,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedMatrix(KernelMatrix):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


def _source_specs(source: Matrix, width: int) -> Matrix:
  """Returns the source with specs for its arrays; `width` is the size of the mesh's width axis."""
  groups = source.k_BTJN.shape[2]
  if groups > 1 and groups % width:
    raise InputError(
        f"config.mesh.{WIDTH_AXIS} = {width} is not valid: with implementation=pallas it has to "
        f"divide the {groups} groups of heads that share keys"
    )
  heads = partition.by_row(None, WIDTH_AXIS)
  keys = partition.by_row(None, WIDTH_AXIS if groups > 1 else None)
  shared = source.log_decay_BTH.shape[0] == 1
  return dataclasses.replace(
      source, q_BTJN=keys, k_BTJN=keys, v_BTE=heads,
      scale_BTH=_unless_none(source.scale_BTH, heads),
      log_decay_BTH=partition.split(None, None, WIDTH_AXIS) if shared else heads,
      gate=_gate_specs(source.gate),
      initial_BHPN=_unless_none(source.initial_BHPN, partition.by_row(WIDTH_AXIS)),
  )


def _gate_specs(gate: ReadGate) -> Any:
  if not isinstance(gate, LowRankGate):
    return _unless_none(gate, partition.by_row(None, WIDTH_AXIS))
  return dataclasses.replace(
      gate, hidden_R=partition.by_row(), up_RE=partition.split(None, WIDTH_AXIS)
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
