"""The arrays of matrix states as the TPU kernels take them."""

import dataclasses

import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import pad_time, split_time
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.kernel_inputs import Source
from dense_jax.ops.matrix.log_decay import summed_log_decay
from dense_jax.ops.matrix.tpu_chunk import Finish, LowRank, Stream
from dense_jax.ops.matrix.tpu_plan import Plan
from dense_jax.ops.recurrence import LowRankGate, ReadGate
from dense_jax.types import Array, PyTree


def _parts(x: Array, parts: int, size: int) -> Array:
  """Pads each of the last axis's parts to `size`, without transposing a large array."""
  extra = size - x.shape[-1] // parts
  if not extra:
    return x
  by_part = x.reshape(*x.shape[:-1], parts, -1)
  return jnp.pad(by_part, ((0, 0),) * x.ndim + ((0, extra),)).reshape(*x.shape[:-1], -1)


def _tokens(plan: Plan, x_BTW: Array, parts: int, size: int) -> Array:
  """Pads tokens, and each of the last axis's parts to `size`."""
  return _parts(pad_time(x_BTW, plan.chunk), parts, size)


def _rows(plan: Plan, x_BTH: Array) -> Array:
  """Returns a number of each token and head as rows of tokens, [B, H, G, 1, C]."""
  return jnp.transpose(split_time(x_BTH, plan.chunk), (0, 3, 1, 2))[:, :, :, None]


def stream(plan: Plan, source: Source, gate: ReadGate) -> Stream:
  """Returns a source, with the gate of its read, as the kernels take it."""
  sums = jax.tree.leaves(summed_log_decay(source.log_decay_BTH, plan.chunk))
  sum_BGC2H = jnp.stack(sums, axis=3)
  initial_BEN = None
  if source.initial_BHPN is not None:
    channels, state_size = source.initial_BHPN.shape[2:]
    extra = (plan.channels - channels, plan.state_size - state_size)
    initial_BHPN = jnp.pad(source.initial_BHPN, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1])))
    initial_BEN = initial_BHPN.reshape(plan.batch, -1, plan.state_size)

  def keys(x_BTJN: Array) -> Array:
    x_BTK = x_BTJN.reshape(*x_BTJN.shape[:2], -1)
    return _tokens(plan, x_BTK, plan.groups, plan.state_size)

  def values(x_BTE: Array | None) -> Array | None:
    return None if x_BTE is None else _tokens(plan, x_BTE, plan.heads, plan.channels)

  factor: PyTree
  if isinstance(gate, LowRankGate):
    up_RE = _parts(gate.up_RE, plan.heads, plan.channels)
    factor = LowRank(pad_time(gate.hidden_R, plan.chunk), up_RE)
  else:
    factor = values(gate)
  return Stream(
      q_BTK=keys(source.q_BTJN), k_BTK=keys(source.k_BTJN), v_BTE=values(source.v_BTE),
      scale_BHG1C=None if source.scale_BTH is None else _rows(plan, source.scale_BTH),
      sum_BHG2C=jnp.transpose(sum_BGC2H, (0, 4, 1, 3, 2)),
      gate=factor, initial_BEN=initial_BEN, joins=source.joins,
  )


def rounded_gate(source: Stream) -> Stream:
  """Returns the source with a low-rank gate's matrix in the dtype of what it multiplies.

  Its gradient is of the matrix before this, and stays float32.
  """
  if not isinstance(source.gate, LowRank):
    return source
  up_RE = source.gate.up_RE.astype(source.gate.hidden_BTR.dtype)
  return dataclasses.replace(source, gate=dataclasses.replace(source.gate, up_RE=up_RE))


def finish(plan: Plan, epilogue: Epilogue) -> Finish:
  """Returns an epilogue's arrays as the kernels take them."""
  skip_1E, (x_BTE, z_BTE) = None, (
      None if x is None else _tokens(plan, x, plan.heads, plan.channels)
      for x in (epilogue.x, epilogue.z)
  )
  if epilogue.skip is not None:
    skip_1E = jnp.repeat(epilogue.skip, plan.channels, total_repeat_length=plan.rows)[None]
  return Finish(skip_1E, x_BTE, z_BTE)
