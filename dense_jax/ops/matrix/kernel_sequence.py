"""`KernelMatrix`: matrix states by kernels that compute the epilogue with the own read."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import jax

from dense_jax.ops import partition
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.matrix import gpu, tpu
from dense_jax.ops.matrix.kernel_inputs import Source
from dense_jax.ops.matrix.sequence import MatrixSequence
from dense_jax.ops.recurrence import KernelRecurrence, LowRankGate, Read, distinct_gates
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelMatrix(KernelRecurrence, MatrixSequence):
  """Computes a layer's own and its sources' reads, and what follows them, by a platform's kernels.

  The base class of the platforms' classes, which give the kernels: `tpu.matrix_finish`, or another
  function with its arguments. Raises `InputError` if the mesh would split a group of heads that
  share keys.
  """

  kernel: ClassVar[Callable[..., tuple[Output, Array]]]
  implementation: ClassVar[str]
  interpret: ClassVar[bool] = False

  def _joint(
      self, query: Array, reads: Sequence[Read], epilogue: Epilogue
  ) -> tuple[Output, Array]:
    gates, numbers = distinct_gates(reads)
    sources = [self._asked(query, None)]
    leader, previous = 0, None
    for read, number in zip(reads, numbers, strict=True):
      source = cast(KernelMatrix, read.recurrence)._asked(read.query, number)
      if previous is not None and _one_recurrence(previous, read):
        sources[leader], source = _joined(sources[leader], source)
      else:
        leader = len(sources)
      sources.append(source)
      previous = read
    # If x is the values themselves, the kernel need not read them twice.
    x = None if epilogue.x is self.v_BTE else self._flat(epilogue.x)
    epilogue = dataclasses.replace(epilogue, x=x, z=self._flat(epilogue.z))
    given = list(map(self._given, gates))
    heads = partition.by_row(None, WIDTH_AXIS)
    moments = partition.by_row(None, WIDTH_AXIS, None) if epilogue.moments else None
    output, final_BHPN = partition.over_mesh(
        functools.partial(type(self).kernel, chunk=self.chunk, interpret=self.interpret),
        lambda width: (
            [source.specs(self.implementation, width) for source in sources],
            list(map(_gate_specs, given)), partition.by_row(), partition.of_epilogue(epilogue),
        ),
        (Output(heads, moments), partition.by_row(WIDTH_AXIS)),
        sources, given, self.resets_BT, epilogue,
    )
    shape = (*self.v_BTE.shape[:2], self.log_decay_BTH.shape[2], -1)
    return dataclasses.replace(output, y=output.y.reshape(shape)), final_BHPN

  def _asked(self, q_BTJN: Array, gate: int | None) -> Source:
    """Returns this recurrence with a query and a gate, as the kernels take it."""
    return Source(
        q_BTJN, self.k_BTJN, self.v_BTE, self.scale_BTH, self.log_decay_BTH, self.initial_BHPN,
        gate,
    )

  def _flat(self, x: Array | None) -> Array | None:
    return None if x is None else x.reshape(self.v_BTE.shape)

  def _given(self, gate: Array | LowRankGate) -> Array | LowRankGate:
    """Returns a gate as the kernels take it."""
    return gate if isinstance(gate, LowRankGate) else gate.reshape(self.v_BTE.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TpuMatrix(KernelMatrix):
  """Runs the kernels of `dense_jax.ops.matrix.tpu`."""

  kernel = staticmethod(tpu.matrix_finish)
  implementation: ClassVar[str] = "pallas"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedTpuMatrix(TpuMatrix):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GpuMatrix(KernelMatrix):
  """Runs the kernels of `dense_jax.ops.matrix.gpu`.

  Between its kernels the sum of the reads that share a gate has the dtype of the queries and
  values, whatever `Read.dtype` is.
  """

  kernel = staticmethod(gpu.matrix_finish)
  implementation: ClassVar[str] = "triton"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpretedGpuMatrix(GpuMatrix):
  """Runs the same kernels interpreted: slow, on any platform."""

  interpret: ClassVar[bool] = True


def _one_recurrence(*reads: Read) -> bool:
  """Returns whether the sum of two reads is a read of the sum of their states."""
  one, other = reads
  equal_decays = all(cast(KernelMatrix, read.recurrence).equal_decays for read in reads)
  return equal_decays and one.query is other.query and one.gate is other.gate


def _joined(leader: Source, source: Source) -> tuple[Source, Source]:
  """Returns two sources, the second of which joins the first."""
  given = [x for x in (leader.initial_BHPN, source.initial_BHPN) if x is not None]
  initial_BHPN = sum(given[1:], start=given[0]) if given else None
  return (
      dataclasses.replace(leader, initial_BHPN=initial_BHPN),
      dataclasses.replace(source, initial_BHPN=None, joins=True),
  )


def _gate_specs(gate: Array | LowRankGate) -> Any:
  """Returns a gate with specs for its arrays."""
  if not isinstance(gate, LowRankGate):
    return partition.by_row(None, WIDTH_AXIS)
  return dataclasses.replace(
      gate, hidden_R=partition.by_row(), up_RE=partition.split(None, WIDTH_AXIS)
  )
