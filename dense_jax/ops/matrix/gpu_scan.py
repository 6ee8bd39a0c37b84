"""GPU kernels that go through a row's chunks in order, with states in registers.

A program takes one row and one part of a head. The products of queries and keys, which all heads of
a group and their parts share, come from a kernel of their own. Arguments of type PyTree, Stream or
Epilogue are references to the program's own blocks of the arrays, all tokens of the row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.gpu_plan import Decays, Plan, Stream, div, open_gate, scaled
from dense_jax.ops.triton_functions import silu, silu_slope
from dense_jax.types import Array, PyTree

State = tuple[Array, ...]
"""The pieces [piece, X] of a state, float32."""


def scores_kernel(
    plan: Plan, queries: Sequence[PyTree], keys: Sequence[PyTree], scores: Sequence[PyTree]
) -> None:
  """Computes the products of a chunk's queries and keys.

  Args:
    plan: the sizes.
    queries: those of each source, [C, N].
    keys: keys.
    scores: products, float32 [Q, S], outputs.
  """
  rows = pl.ds(0, plan.chunk)
  for q_TN, k_TN, scores_QS in zip(queries, keys, scores, strict=True):
    scores_QS[...] = plan.summed_dot(plan.load(q_TN, rows), plan.load(k_TN, rows), (1, 1))


class _Recurrence(NamedTuple):
  """One state as a program goes through its chunks: a leader, and what joins it."""

  plan: Plan
  streams: Sequence[Stream]
  decays: Decays

  @classmethod
  def of(cls, plan: Plan, streams: Sequence[Stream], count_T: PyTree) -> "_Recurrence":
    """Returns the recurrence of a leader, and of what joins it."""
    return cls(plan, streams, Decays(plan, streams[0], count_T))

  def initial(self) -> State:
    """Returns the state before the first token."""
    return _initial(self.plan, self.streams[0].initial_BHPN)

  def values(self, stream: Stream, chunk: Array) -> Array:
    """Returns the scaled values of a source's chunk, [C, X]."""
    rows = self.plan.rows(chunk)
    scale_T = None if stream.scale_BHT is None else stream.scale_BHT[rows]
    return scaled(stream.v_BTE[rows, :], scale_T)

  def read(self, scores: Sequence[PyTree], chunk: Array, h: State) -> Array:
    """Returns the read of a chunk, [C, X] in float32.

    Args:
      scores: for each source, the products of each token's query with its chunk's keys.
      chunk: the chunk.
      h: the state before it.
    """
    plan, rows = self.plan, self.plan.rows(chunk)
    q = plan.load(self.streams[0].q_BTK, rows)
    decay_QS = self.decays.within(chunk)
    weights = [scores_TS[rows, :] * decay_QS for scores_TS in scores]
    read_TX = self.decays.from_start(chunk)[:, None] * plan.summed_dot(q, h, (1, 0))
    for stream, weights_QS in zip(self.streams, weights, strict=True):
      read_TX += plan.dot(weights_QS, self.values(stream, chunk), (1, 0))
    return read_TX

  def after(self, chunk: Array, h: State) -> State:
    """Returns the state after a chunk, given that before it."""
    plan, whole = self.plan, self.decays.whole(chunk)
    to_end_T1 = self.decays.to_end(chunk)[:, None]
    h = tuple(whole * h_NX for h_NX in h)
    for stream in self.streams:
      k = plan.load(stream.k_BTK, plan.rows(chunk))
      kept_TX = to_end_T1 * self.values(stream, chunk).astype(jnp.float32)
      h = tuple(
          h_NX + plan.dot(k_TN, kept_TX, (0, 0)) for h_NX, k_TN in zip(h, k, strict=True)
      )
    return h


def states_kernel(
    plan: Plan, streams: Sequence[Stream], count_T: PyTree, before_GNX: PyTree
) -> None:
  """Computes a recurrence's states before each chunk, for the backward pass.

  Args:
    plan: the sizes.
    streams: a source, and those that join it.
    count_T: resets up to each token, inclusive; None means none.
    before_GNX: the states, an output.
  """
  states = _Recurrence.of(plan, streams, count_T)

  def step(chunk: Array, h: State) -> State:
    _save(plan, before_GNX, chunk, h)
    return states.after(chunk, h)

  jax.lax.fori_loop(0, plan.chunks, step, states.initial())


def read_kernel(
    plan: Plan,
    streams: Sequence[Stream],
    scores: Sequence[PyTree],
    count_T: PyTree,
    others_TX: PyTree,
    read_TX: PyTree,
) -> None:
  """Computes the reads of a shallow source, and of those that join it.

  Args:
    plan: the sizes.
    streams: a source, and those that join it.
    scores: for each, the products of each token's query with its chunk's keys.
    count_T: resets up to each token, inclusive; None means none.
    others_TX: reads that are added, of other sources with the same gate; None means none.
    read_TX: the sum, an output.
  """
  states = _Recurrence.of(plan, streams, count_T)

  def step(chunk: Array, h: State) -> State:
    rows = plan.rows(chunk)
    sum_TX = states.read(scores, chunk, h)
    if others_TX is not None:
      sum_TX += others_TX[rows, :].astype(jnp.float32)
    read_TX[rows, :] = sum_TX.astype(read_TX.dtype)
    return states.after(chunk, h)

  jax.lax.fori_loop(0, plan.chunks, step, states.initial())


def forward_kernel(
    plan: Plan,
    stream: Stream,
    scores_TS: PyTree,
    ungated_TX: PyTree,
    gates: tuple[PyTree, ...],
    gated: tuple[PyTree, ...],
    epilogue: Epilogue,
    count_T: PyTree,
    out_TX: PyTree,
    open_TX: PyTree,
    moments_2T: PyTree,
    read_TX: PyTree,
    final_XN: PyTree,
) -> None:
  """Computes the epilogue of the sum of all sources' gated reads; `stream` is the layer's own.

  Args:
    plan: the sizes.
    stream: the layer's own recurrence.
    scores_TS: the products of each token's query with its chunk's keys.
    ungated_TX: the sum of other sources' reads without a gate; None means none.
    gates: gates of reads, [T, X], or low-rank ones.
    gated: for each gate the sum of other sources' reads that it multiplies; None means none.
    epilogue: the epilogue's arrays.
    count_T: resets up to each token, inclusive; None means none.
    out_TX: the result, an output.
    open_TX: the result before its gate, an output; None without a gate, or if nothing is saved
      for the backward pass.
    moments_2T: sums of the result and of its squares over X, an output; None means not wanted.
    read_TX: the sum of the reads that the own read's gate multiplies, an output; None without
      such a gate, or if nothing is saved.
    final_XN: the last state, an output.
  """
  own = _Recurrence.of(plan, (stream,), count_T)
  head = div(pl.program_id(1), plan.parts)

  def step(chunk: Array, h: State) -> State:
    rows = plan.rows(chunk)
    own_TX = own.read((scores_TS,), chunk, h)
    y_TX = own_TX if plan.gates[0] is None else jnp.zeros_like(own_TX)
    if ungated_TX is not None:
      y_TX += ungated_TX[rows, :].astype(jnp.float32)
    for number, (gate, others_TX) in enumerate(zip(gates, gated, strict=True)):
      sum_TX = jnp.zeros_like(own_TX)
      if others_TX is not None:
        sum_TX += others_TX[rows, :].astype(jnp.float32)
      if plan.gates[0] == number:
        sum_TX += own_TX
        if read_TX is not None:
          read_TX[rows, :] = sum_TX.astype(read_TX.dtype)
      y_TX += open_gate(plan, gate, rows)[0] * sum_TX
    if epilogue.skip is not None:
      x_TX = (stream.v_BTE if epilogue.x is None else epilogue.x)[rows, :]
      y_TX += epilogue.skip[head] * x_TX.astype(jnp.float32)
    if epilogue.z is not None:
      if open_TX is not None:
        open_TX[rows, :] = y_TX.astype(open_TX.dtype)
      y_TX *= silu(epilogue.z[rows, :].astype(jnp.float32))
    out_TX[rows, :] = y_TX.astype(out_TX.dtype)
    if moments_2T is not None:
      moments_2T[0, rows] = jnp.sum(y_TX, axis=1)
      moments_2T[1, rows] = jnp.sum(y_TX * y_TX, axis=1)
    return own.after(chunk, h)

  final = jax.lax.fori_loop(0, plan.chunks, step, own.initial())
  _store_state(plan, final_XN, final)


def _save(plan: Plan, saved_GNX: PyTree, chunk: Array, h: State) -> None:
  """Writes a chunk's state, or its gradient."""
  for start, h_NX in zip(plan.pieces, h, strict=True):
    saved_GNX[chunk, pl.ds(start, plan.piece), :] = h_NX.astype(saved_GNX.dtype)


def _initial(plan: Plan, h_XN: PyTree) -> State:
  """Loads a state; None means zero."""
  if h_XN is None:
    return tuple(jnp.zeros((plan.piece, plan.width), jnp.float32) for _ in plan.pieces)
  return tuple(h_XN[:, pl.ds(start, plan.piece)].T for start in plan.pieces)


def _store_state(plan: Plan, h_XN: PyTree, h: State) -> None:
  """Writes a state, or its gradient; to None, nothing."""
  if h_XN is not None:
    for start, h_NX in zip(plan.pieces, h, strict=True):
      h_XN[:, pl.ds(start, plan.piece)] = h_NX.T


def states_backward_kernel(
    plan: Plan,
    stream: Stream,
    gates: tuple[PyTree, ...],
    reads: Sequence[PyTree],
    z_TX: PyTree,
    count_T: PyTree,
    open_TX: PyTree,
    d_out_TX: PyTree,
    d_moments_2T: PyTree,
    d_final_XN: PyTree,
    d_y_TX: PyTree,
    d_z_TX: PyTree,
    d_reads: Sequence[PyTree],
    d_gates: Sequence[PyTree],
    d_after_GNX: PyTree,
    d_initial_XN: PyTree,
) -> None:
  """Computes the gradients of the sum of reads, of all gates and of the layer's own states.

  Args:
    plan: the sizes.
    stream: the layer's own recurrence.
    gates: gates of reads, [T, X], or low-rank ones.
    reads: for each gate the sum of the reads that it multiplies.
    z_TX: the epilogue's gate; None means no gate.
    count_T: resets up to each token, inclusive; None means none.
    open_TX: the epilogue's result before its gate; None if no gradient depends on it.
    d_out_TX: the result's gradient.
    d_moments_2T: the gradient of its moments; None means zero.
    d_final_XN: the gradient of the last state.
    d_y_TX: the gradient of the sum of reads, an output; None if it is `d_out_TX`.
    d_z_TX: the gate's gradient, an output; None without a gate.
    d_reads: for each gate the gradient of the reads that it multiplies, [T, X], outputs.
    d_gates: the gradient of each gate, that of a low-rank one before its activation, outputs.
    d_after_GNX: the gradient of the state after each chunk, an output.
    d_initial_XN: the gradient of the first state, an output; None where it was zero.
  """

  def d_read(chunk: Array) -> Array:
    rows = plan.rows(chunk)
    d_TX = d_out_TX[rows, :].astype(jnp.float32)
    if z_TX is not None:
      z, y = z_TX[rows, :].astype(jnp.float32), open_TX[rows, :].astype(jnp.float32)
      d_TX = _with_moments(d_TX, y * silu(z), d_moments_2T, rows)
      d_z_TX[rows, :] = (d_TX * y * silu_slope(z)).astype(d_z_TX.dtype)
      d_TX *= silu(z)
    elif d_moments_2T is not None:
      d_TX = _with_moments(d_TX, open_TX[rows, :].astype(jnp.float32), d_moments_2T, rows)
    if d_y_TX is not None:
      d_TX = _stored(d_TX, d_y_TX, rows)
    d_own_TX = d_TX
    for number, (gate, read_TX) in enumerate(zip(gates, reads, strict=True)):
      factor_TX, slope_TX = open_gate(plan, gate, rows)
      d_factor_TX = d_TX * read_TX[rows, :].astype(jnp.float32)
      if slope_TX is not None:
        d_factor_TX *= slope_TX
      d_gates[number][rows, :] = d_factor_TX.astype(d_gates[number].dtype)
      d_read_TX = _stored(d_TX * factor_TX, d_reads[number], rows)
      if plan.gates[0] == number:
        d_own_TX = d_read_TX
    return d_own_TX

  _scan_backward(plan, stream, count_T, d_read, d_final_XN, d_after_GNX, d_initial_XN)


def read_backward_kernel(
    plan: Plan, stream: Stream, count_T: PyTree, d_read_TX: PyTree, d_after_GNX: PyTree,
    d_initial_XN: PyTree,
) -> None:
  """Computes the gradients of a shallow source's states.

  Args:
    plan: the sizes.
    stream: the source.
    count_T: resets up to each token, inclusive; None means none.
    d_read_TX: the gradient of its read.
    d_after_GNX: the gradient of the state after each chunk, an output.
    d_initial_XN: the gradient of the first state, an output; None where it was zero.
  """

  def d_read(chunk: Array) -> Array:
    return d_read_TX[plan.rows(chunk), :].astype(jnp.float32)

  _scan_backward(plan, stream, count_T, d_read, None, d_after_GNX, d_initial_XN)


def _scan_backward(
    plan: Plan, stream: Stream, count_T: PyTree, d_read: Callable[[Array], Array],
    d_final_XN: PyTree, d_after_GNX: PyTree, d_initial_XN: PyTree,
) -> None:
  """Runs the recurrence of a state's gradient, given that of the read of each chunk."""
  decays = Decays(plan, stream, count_T)

  def step(index: Array, dh: State) -> State:
    chunk = plan.chunks - 1 - index
    _save(plan, d_after_GNX, chunk, dh)
    d_carried_TX = decays.from_start(chunk)[:, None] * d_read(chunk)
    whole, q = decays.whole(chunk), plan.load(stream.q_BTK, plan.rows(chunk))
    return tuple(
        whole * dh_NX + plan.dot(q_TN, d_carried_TX, (0, 0))
        for dh_NX, q_TN in zip(dh, q, strict=True)
    )

  dh = jax.lax.fori_loop(0, plan.chunks, step, _initial(plan, d_final_XN))
  _store_state(plan, d_initial_XN, dh)


def _stored(d_TX: Array, stored_TX: PyTree, rows: PyTree) -> Array:
  """Writes a gradient, and returns it as rounded: all that follows from it is rounded alike."""
  d_low_TX = d_TX.astype(stored_TX.dtype)
  stored_TX[rows, :] = d_low_TX
  return d_low_TX.astype(jnp.float32)


def _with_moments(d_TX: Array, out_TX: Array, d_moments_2T: PyTree, rows: PyTree) -> Array:
  """Adds to the result's gradient what comes from its moments; None means nothing."""
  if d_moments_2T is None:
    return d_TX
  return d_TX + d_moments_2T[0, rows][:, None] + 2 * d_moments_2T[1, rows][:, None] * out_TX
