"""Matrix states by TPU kernels: a layer's own and its sources' reads in one pass over memory."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from dense_jax.errors import InputError
from dense_jax.ops import partition
from dense_jax.ops.matrix.sequence import MatrixSequence
from dense_jax.ops.matrix.tpu import Matrix, matrix_reads
from dense_jax.ops.recurrence import Read, add_reads
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelMatrix(MatrixSequence):
  """Runs the kernels of `dense_jax.ops.matrix.tpu`, compiled for a TPU."""

  interpret: ClassVar[bool] = False

  def _scan(self, q_BTJN: Array) -> tuple[Array, Array]:
    return self.run(q_BTJN)

  def run(self, query: Array, reads: Sequence[Read] = ()) -> tuple[Array, Array]:
    """See `Recurrence`: q_BTJN -> y_BTHP, h_BHPN.

    One kernel computes the own read and all `reads`, if each of those reads a `KernelMatrix`
    without a function; otherwise they are added one after the other.

    Raises:
      InputError: the mesh would split a group of heads that share keys.
    """
    joint = all(isinstance(r.recurrence, KernelMatrix) and r.function is None for r in reads)
    sources = [self._asked(query, None)]
    for read in reads if joint else ():
      sources.append(cast(KernelMatrix, read.recurrence)._asked(read.query, read.gate))
    y_BTHP, final_BHPN = partition.over_mesh(
        functools.partial(matrix_reads, chunk=self.chunk, interpret=self.interpret), _specs,
        (partition.by_row(None, WIDTH_AXIS), partition.by_row(WIDTH_AXIS)), sources,
        self.resets_BT,
    )
    return y_BTHP if joint else add_reads(y_BTHP, reads), final_BHPN

  def _asked(self, q_BTJN: Array, gate: Array | None) -> Matrix:
    """Returns this recurrence with a query and a gate, as the kernel's input."""
    if gate is not None:
      gate = gate.astype(jnp.float32).reshape(self.v_BTHP.shape)
    return Matrix(
        q_BTJN, self.k_BTJN, self.scaled_BTHP(), self.log_decay_BTH, gate, self.before_first()
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedMatrix(KernelMatrix):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


def _specs(source: Matrix, width: int) -> Matrix:
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
      source, q_BTJN=keys, k_BTJN=keys, v_BTHP=heads,
      initial_BHPN=partition.by_row(WIDTH_AXIS),
      log_decay_BTH=partition.split(None, None, WIDTH_AXIS) if shared else heads,
      gate_BTHP=None if source.gate_BTHP is None else heads,
  )
