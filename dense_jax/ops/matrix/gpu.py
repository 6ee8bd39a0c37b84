"""A layer's matrix states and those of its shallow sources, read on a GPU.

    h_t = a_t h_{t-1} + v_t k_t^T        y_t = sum over sources of gate_t * (h_t q_t)

and the epilogue of y. The arithmetic is that of `dense_jax.ops.matrix.chunked` (chunkwise form,
arXiv 2307.08621, section 2.3; heads that share keys, arXiv 2405.21060, section 7.2). The
difference is the memory: states stay in registers, and neither decayed scores nor low-rank gates
are written to memory. Seven kernels:

| kernel                   | a program takes           | it reads             | it writes          |
|--------------------------|---------------------------|----------------------|--------------------|
| `scores_kernel`          | a chunk, a group of heads | queries, keys        | their products     |
| `read_kernel`            | a row, a part of a head,  | sources, products    | the sum of reads   |
|                          | a recurrence of sources   | of queries and keys, | with the same gate |
|                          |                           | earlier sources' sum |                    |
| `forward_kernel`         | a row, a part of a head   | the own source, sums | result; the result |
|                          |                           | of reads, gates, z   | before z           |
| `states_backward_kernel` | the same, chunks reversed | queries, gates, z,   | gradients of the   |
|                          |                           | what was saved, the  | reads, of gates, z |
|                          |                           | result's gradient    | and the own states |
| `read_backward_kernel`   | the same, of a recurrence | queries, the read's  | gradients of its   |
|                          | of sources                | gradient             | states             |
| `states_kernel`          | a row, a part of a head,  | keys, values         | states, for the    |
|                          | a recurrence              |                      | next kernel        |
| `chunks_backward_kernel` | a chunk, a group of heads,| one source, states,  | gradients of the   |
|                          | one source                | these gradients      | source             |

Sources that join (`kernel_inputs.Source`) are one recurrence: one state, read once.

Chunks and passes were chosen on a card, an H200, whose times memory traffic does not explain: these
kernels wait at barriers between small matmuls. Chunks of 256 tokens, as four tiles of 64, moved a
tenth less memory in a step of mamba2, and a layer's recurrence took 1.4 times as long.

Why Triton, through Pallas. One kernel (a chunk's read) was written twice and compiled for the H100.
As Pallas-Triton it took about 20 lines, 255 registers and 148 KB of shared memory with 8 warps; its
compiler chooses layouts, Hopper's wgmma and asynchronous copies, and it ran interpreted on jax 0.10
and 0.12. As Mosaic GPU it took about 45 lines with explicit barriers, layouts and copies and 246
registers, without spills; what compiled with jax 0.11 was not interpreted by 0.10, which has no
public interpreter for it, nor by 0.12, whose `load` takes other arguments. jax-triton, which needs
Python 3.12, was not tried. jax has deprecated its Triton backend: if it goes, the arithmetic below
can move to another.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import pad_time, round_up
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.matrix.gpu_backward_calls import (
  call_chunks_backward,
  call_read_backward,
  call_states,
  call_states_backward,
)
from dense_jax.ops.matrix.gpu_forward_calls import call_forward
from dense_jax.ops.matrix.gpu_plan import Plan, Stream, power_of_two, recurrence
from dense_jax.ops.matrix.gpu_program import PartSums, TokenSums
from dense_jax.ops.matrix.gpu_specs import Gate
from dense_jax.ops.matrix.kernel_inputs import Source, check_inputs
from dense_jax.ops.matrix.log_decay import summed_log_decay
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array, PyTree

# Tokens per chunk: the rows of Hopper's matrix unit for one group of warps.
CHUNK = 64
# The least size of an axis of a matmul.
_LEAST = 16
# Most state numbers of one program of a scan: 64 registers of each of 256 threads.
_STATE_NUMBERS = 64 * 256


def matrix_finish(
    sources: Sequence[Source],
    gates: Sequence[Gate],
    resets_BT: Array | None,
    epilogue: Epilogue,
    *,
    chunk: int = 0,
    interpret: bool = False,
) -> tuple[Output, Array]:
  """Computes the epilogue of the sum of all sources' gated reads, and the first one's last state.

  Differentiable in every float input; each gradient has its input's dtype.

  Args:
    sources: recurrences of equal shapes: the layer's own, then its shallow sources.
    gates: gates of reads, [B, T, E] or low-rank; several sources may share one.
    resets_BT: bool, true where every state is cleared before the token; None means never.
    epilogue: what follows the reads; `skip` without `x` multiplies the first source's values.
    chunk: tokens per chunk, rounded up to a power of two from 16 to CHUNK; 0 means CHUNK.
    interpret: true to run the kernels as ordinary JAX, on any platform.

  Returns:
    The result, its y [B, T, E], and final_BHPN, float32.
  """
  batch, time, _, state_size = sources[0].k_BTJN.shape
  heads = sources[0].log_decay_BTH.shape[2]
  channels = sources[0].v_BTE.shape[2] // heads
  check_inputs(sources, gates, resets_BT, epilogue)
  plan = _plan(sources, epilogue, chunk or CHUNK, interpret)
  count_BT = None
  if resets_BT is not None:
    count_BT = jnp.cumsum(resets_BT, axis=1, dtype=jnp.int32)
    count_BT = jnp.pad(count_BT, ((0, 0), (0, plan.time - time)), mode="edge")

  def wide(x_BTE: Array | None) -> Array | None:
    return None if x_BTE is None else _channels(plan, x_BTE)

  # The barrier keeps all results together: of a custom_vjp with optimize_remat, jax drops those
  # that are not used, and then fails if it drops others later.
  out_BTE, moments_BHA2T, final_BHPN = jax.lax.optimization_barrier(_finish(
      plan, tuple(_stream(plan, source) for source in sources),
      tuple(_gate(plan, gate) for gate in gates),
      dataclasses.replace(epilogue, x=wide(epilogue.x), z=wide(epilogue.z)), count_BT,
  ))
  out_BTHP = out_BTE.reshape(batch, -1, heads, plan.channels)[:, :time, :, :channels]
  moments_BTH2 = None
  if moments_BHA2T is not None:
    moments_BTH2 = jnp.transpose(jnp.sum(moments_BHA2T, axis=2)[..., :time], (0, 3, 1, 2))
  out_BTE = out_BTHP.reshape(batch, time, -1)
  return Output(out_BTE, moments_BTH2), final_BHPN[:, :, :channels, :state_size]


def _plan(sources: Sequence[Source], epilogue: Epilogue, chunk: int, interpret: bool) -> Plan:
  own = sources[0]
  batch, time, groups, state_size = own.k_BTJN.shape
  heads = own.log_decay_BTH.shape[2]
  channels = own.v_BTE.shape[2] // heads
  least, chunk = min(chunk, time), CHUNK
  while chunk > _LEAST and chunk // 2 >= least:
    chunk //= 2
  channels, state_size = round_up(channels, _LEAST), round_up(state_size, _LEAST)
  width = power_of_two(channels, 64)
  while width > _LEAST and state_size * width > _STATE_NUMBERS:
    width //= 2
  return Plan(
      batch=batch, tokens=time, chunks=-(-time // chunk), chunk=chunk, heads=heads, groups=groups,
      channels=channels, state_size=state_size, width=width,
      piece=power_of_two(state_size, 128), gates=tuple(source.gate for source in sources),
      dtype=jnp.result_type(own.q_BTJN, own.k_BTJN, own.v_BTE), out=epilogue.dtype,
      moments=epilogue.moments, shared_decay=own.log_decay_BTH.shape[0] == 1, interpret=interpret,
  )


def _tokens(plan: Plan, x_BTHP: Array, width: int) -> Array:
  """Pads time and the last axis, and merges the last two."""
  extra = width - x_BTHP.shape[3]
  x_BTHP = jnp.pad(pad_time(x_BTHP, plan.chunk), ((0, 0), (0, 0), (0, 0), (0, extra)))
  return x_BTHP.reshape(*x_BTHP.shape[:2], -1)


def _channels(plan: Plan, x_BTE: Array) -> Array:
  """Pads time and each head's channels."""
  return _tokens(plan, x_BTE.reshape(*x_BTE.shape[:2], plan.heads, -1), plan.channels)


def _stream(plan: Plan, source: Source) -> Stream:
  """Pads, merges and transposes a source's arrays; those of every channel are not transposed."""

  def by_head(x_BTH: Array) -> Array:
    return jnp.swapaxes(x_BTH.reshape(x_BTH.shape[0], plan.time, plan.heads), 1, 2)

  sums = summed_log_decay(source.log_decay_BTH, plan.chunk)
  scale_BHT = initial_BHPN = None
  if source.scale_BTH is not None:
    scale_BHT = by_head(pad_time(source.scale_BTH.astype(jnp.float32), plan.chunk))
  if source.initial_BHPN is not None:
    channels, state_size = source.initial_BHPN.shape[2:]
    extra = (plan.channels - channels, plan.state_size - state_size)
    initial_BHPN = jnp.pad(source.initial_BHPN, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1])))
  return Stream(
      q_BTK=_tokens(plan, source.q_BTJN, plan.state_size),
      k_BTK=_tokens(plan, source.k_BTJN, plan.state_size),
      v_BTE=_channels(plan, source.v_BTE),
      scale_BHT=scale_BHT, high_BHT=by_head(sums.high), low_BHT=by_head(sums.low),
      initial_BHPN=initial_BHPN, joins=source.joins,
  )


def _gate(plan: Plan, gate: Gate) -> Gate:
  """Pads a gate; a rank has to be a power of two."""
  if not isinstance(gate, LowRankGate):
    return _channels(plan, gate)
  rank = len(gate.up_RE)
  extra = max(_LEAST, 1 << (rank - 1).bit_length()) - rank
  up_REP = gate.up_RE.reshape(rank, plan.heads, -1)
  wider = plan.channels - up_REP.shape[2]
  return dataclasses.replace(
      gate,
      hidden_R=jnp.pad(pad_time(gate.hidden_R, plan.chunk), ((0, 0), (0, 0), (0, extra))),
      up_RE=jnp.pad(up_REP, ((0, extra), (0, 0), (0, wider))).reshape(rank + extra, -1),
  )


_Inputs = tuple[tuple[Stream, ...], tuple[Gate, ...], Epilogue, Array | None]


_Outputs = tuple[Array, Array | None, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _finish(plan: Plan, *inputs: Any) -> _Outputs:
  """Computes `matrix_finish` of padded arrays: `inputs` are `_Inputs`."""
  found = call_forward(plan, *inputs, save=False)
  return found.out_BTE, found.moments_BHA2T, found.final_BHPN


def _finish_forward(plan: Plan, *inputs: Any) -> tuple[_Outputs, PyTree]:
  found = call_forward(plan, *inputs, save=True)
  opened = found.out_BTE if found.open_BTE is None else found.open_BTE
  saved = inputs, opened, found.reads
  return (found.out_BTE, found.moments_BHA2T, found.final_BHPN), saved


def _finish_backward(plan: Plan, saved: PyTree, gradients: _Outputs) -> _Inputs:
  (streams, gates, epilogue, count_BT), open_BTE, reads = saved
  d_out_BTE, d_moments_BHA2T, d_final_BHPN = gradients
  # Parts of a head are summed, so each has the gradient of their sum.
  d_moments_BH2T = None if d_moments_BHA2T is None else d_moments_BHA2T[:, :, 0]
  d = call_states_backward(
      plan, streams[0], gates, epilogue.z, count_BT, open_BTE, reads,
      (d_out_BTE, d_moments_BH2T, d_final_BHPN),
  )
  d_streams: list[Stream] = []
  d_epilogue = epilogue
  for source, (stream, gate) in enumerate(zip(streams, plan.gates, strict=True)):
    own = None if source else dataclasses.replace(epilogue, z=None)
    d_read_BTE, d_y_BTE = (d.y_BTE, None) if gate is None else (d.reads[gate], d.y_BTE)
    if own is None or own.skip is None:
      d_y_BTE = None
    before = d_initial = None
    if not stream.joins:
      together = recurrence(streams, source)
      if len(together) > 1:
        # The compiler would make these states early, and hold them beside those of the sources
        # before. A single source's are made once for all layers of a super-block, barrier or not.
        together, d_streams[-1] = jax.lax.optimization_barrier((together, d_streams[-1]))
      d_after, d_initial = d.after, d.initial
      if source:
        d_after, d_initial = call_read_backward(plan, stream, count_BT, d_read_BTE)
      before = call_states(plan, together, count_BT)
    d_stream, d_x_BTE, sums, parts = call_chunks_backward(
        plan, stream, own, count_BT, d_read_BTE, d_y_BTE, (before, d_after)
    )
    d_streams.append(_gradient(plan, stream, d_stream, sums, parts, d_initial))
    if not source:
      d_skip = None if parts.skip is None else jnp.sum(parts.skip, axis=(0, 1, 3))
      d_epilogue = dataclasses.replace(epilogue, skip=d_skip, x=d_x_BTE, z=d.z_BTE)
  d_gates = tuple(map(_gate_gradient, gates, d.gates))
  return tuple(d_streams), d_gates, d_epilogue, None


def _gate_gradient(gate: Gate, d_gate_BTE: Array) -> Gate:
  """Returns a gate's gradient; a low-rank one has that of its value before the activation."""
  if not isinstance(gate, LowRankGate):
    return d_gate_BTE
  _, vjp = jax.vjp(gate.matmul, gate.hidden_R, gate.up_RE)
  d_hidden_R, d_up_RE = vjp(d_gate_BTE)
  return dataclasses.replace(gate, hidden_R=d_hidden_R, up_RE=d_up_RE)


def _gradient(
    plan: Plan, stream: Stream, d_stream: Stream, sums: TokenSums, parts: PartSums,
    d_initial_BHPN: Array | None,
) -> Stream:
  """Returns a source's gradient."""
  d_low_BHT = jnp.sum(sums.read, axis=(2, 3)) - jnp.sum(sums.value, axis=2)
  last_BGH = jnp.sum(parts.last, axis=3)
  if parts.whole is not None:
    last_BGH += jnp.sum(parts.whole, axis=(3, 4))
  is_last_C = jnp.arange(plan.chunk) == plan.chunk - 1
  last_BHG1 = jnp.swapaxes(last_BGH, 1, 2)[..., None]
  d_low_BHT += jnp.where(is_last_C[None, None, None], last_BHG1, 0.0).reshape(d_low_BHT.shape)
  if plan.shared_decay:
    d_low_BHT = jnp.sum(d_low_BHT, axis=0, keepdims=True)
  return dataclasses.replace(
      d_stream, high_BHT=jnp.zeros_like(stream.high_BHT), low_BHT=d_low_BHT,
      scale_BHT=None if sums.scale is None else jnp.sum(sums.scale, axis=2),
      initial_BHPN=d_initial_BHPN,
  )


# Where the backward pass computes a layer again, the forward pass need not save anything.
_finish.defvjp(_finish_forward, _finish_backward, optimize_remat=True)
