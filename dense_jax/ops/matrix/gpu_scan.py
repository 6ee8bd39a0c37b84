"""GPU kernels that go through a row's tiles in order, with states in registers.

A program takes one row and one part of a head. The products of queries and keys, which all heads of
a group and their parts share, come from a kernel of their own. Arguments of type PyTree, Stream or
Epilogue are references to the program's own blocks of the arrays, all tokens of the row.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.gpu_tiles import Decays, Plan, Stream, div, open_gate, rem, scaled
from dense_jax.ops.triton_functions import sigmoid
from dense_jax.types import Array, PyTree

States = tuple[tuple[Array, ...], ...]
"""For each source the pieces [piece, X] of its state, float32."""


def scores_kernel(
    plan: Plan, queries: Sequence[PyTree], keys: Sequence[PyTree], scores: Sequence[PyTree]
) -> None:
  """Computes the products of a tile's queries and keys.

  Args:
    plan: the sizes.
    queries: those of each source, [tile, N].
    keys: keys.
    scores: products, float32 [Q, S], outputs.
  """
  rows = pl.ds(0, plan.tile)
  for q_TN, k_TN, scores_QS in zip(queries, keys, scores, strict=True):
    scores_QS[...] = plan.summed_dot(plan.load(q_TN, rows), plan.load(k_TN, rows), (1, 1))


def forward_kernel(
    plan: Plan,
    streams: tuple[Stream, ...],
    scores: Sequence[PyTree],
    gates: tuple[PyTree, ...],
    epilogue: Epilogue,
    count_T: PyTree,
    out_TX: PyTree,
    open_TX: PyTree,
    moments_2T: PyTree,
    reads: Sequence[PyTree],
    before: Sequence[PyTree],
    final_XN: PyTree,
) -> None:
  """Computes the epilogue of the sum of all sources' gated reads, and the states between chunks.

  Args:
    plan: the sizes.
    streams: the sources.
    scores: for each source the products of each token's query with its tile's keys, [T, S].
    gates: gates of reads, [T, X], or low-rank ones.
    epilogue: the epilogue's arrays.
    count_T: resets up to each token, inclusive; None means none.
    out_TX: the result, an output.
    open_TX: the result before its gate, an output; None without a gate, or if nothing is saved
      for the backward pass.
    moments_2T: sums of the result and of its squares over X, an output; None means not wanted.
    reads: for each gate the sum of the reads that it multiplies, [T, X], outputs if saved.
    before: each source's states before each chunk, [G, N, X], outputs if saved.
    final_XN: the first source's last state, an output.
  """
  decays = [Decays(plan, stream, count_T) for stream in streams]
  head = div(pl.program_id(1), plan.parts)

  def step(tile: Array, states: States) -> States:
    rows, first = plan.rows(tile), tile * plan.tile
    last = first + plan.tile - 1

    @pl.when(rem(tile, plan.tiles) == 0)
    def _save() -> None:
      for h_GNX, pieces in zip(before, states, strict=False):  # None at all if not saved.
        for start, h_NX in zip(plan.pieces, pieces, strict=True):
          h_GNX[div(tile, plan.tiles), pl.ds(start, plan.piece), :] = h_NX.astype(h_GNX.dtype)

    y_TX = jnp.zeros((plan.tile, plan.width), jnp.float32)
    gated = [y_TX] * len(gates)
    after = []
    for index, (stream, decay, h) in enumerate(zip(streams, decays, states, strict=True)):
      q, k = plan.load(stream.q_BTK, rows), plan.load(stream.k_BTK, rows)
      scale_T = None if stream.scale_BHT is None else stream.scale_BHT[rows]
      v_TX = scaled(plan, stream.v_BTE[rows, :], scale_T)
      weights_QS = scores[index][rows, :] * decay.between(tile, tile, same=True)
      read_TX = decay.since(first, rows)[:, None] * plan.summed_dot(q, h, (1, 0))
      read_TX += plan.dot(weights_QS, v_TX, (1, 0))
      if (number := plan.gates[index]) is None:
        y_TX += read_TX
      else:
        gated[number] += read_TX
      kept_TX = decay.to(last, rows)[:, None] * v_TX.astype(jnp.float32)
      whole = decay.since(first, last)
      after.append(tuple(
          whole * h_NX + plan.dot(k_TN, kept_TX, (0, 0)) for h_NX, k_TN in zip(h, k, strict=True)
      ))
    for number, (gate, read_TX) in enumerate(zip(gates, gated, strict=True)):
      if reads:
        reads[number][rows, :] = read_TX.astype(reads[number].dtype)
      y_TX += open_gate(plan, gate, rows)[0] * read_TX
    if epilogue.skip is not None:
      x_TX = (streams[0].v_BTE if epilogue.x is None else epilogue.x)[rows, :]
      y_TX += epilogue.skip[head] * x_TX.astype(jnp.float32)
    if epilogue.z is not None:
      if open_TX is not None:
        open_TX[rows, :] = y_TX.astype(open_TX.dtype)
      z_TX = epilogue.z[rows, :].astype(jnp.float32)
      y_TX *= z_TX * sigmoid(z_TX)
    out_TX[rows, :] = y_TX.astype(out_TX.dtype)
    if moments_2T is not None:
      moments_2T[0, rows] = jnp.sum(y_TX, axis=1)
      moments_2T[1, rows] = jnp.sum(y_TX * y_TX, axis=1)
    return tuple(after)

  states = tuple(_initial(plan, stream.initial_BHPN) for stream in streams)
  states = jax.lax.fori_loop(0, plan.chunks * plan.tiles, step, states)
  for start, h_NX in zip(plan.pieces, states[0], strict=True):
    final_XN[:, pl.ds(start, plan.piece)] = h_NX.T


def _initial(plan: Plan, h_XN: PyTree) -> tuple[Array, ...]:
  """Loads a state; None means zero."""
  if h_XN is None:
    return tuple(jnp.zeros((plan.piece, plan.width), jnp.float32) for _ in plan.pieces)
  return tuple(h_XN[:, pl.ds(start, plan.piece)].T for start in plan.pieces)


def states_backward_kernel(
    plan: Plan,
    streams: tuple[Stream, ...],
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
    d_after: Sequence[PyTree],
    d_initial: Sequence[PyTree],
) -> None:
  """Computes the gradients of the sum of reads, of all gates and of states between chunks.

  Args:
    plan: the sizes.
    streams: the sources.
    gates: gates of reads, [T, X], or low-rank ones.
    reads: for each gate the sum of the reads that it multiplies.
    z_TX: the epilogue's gate; None means no gate.
    count_T: resets up to each token, inclusive; None means none.
    open_TX: the epilogue's result before its gate; None if no gradient depends on it.
    d_out_TX: the result's gradient.
    d_moments_2T: the gradient of its moments; None means zero.
    d_final_XN: the gradient of the first source's last state.
    d_y_TX: the gradient of the sum of reads, an output; None if it is `d_out_TX`.
    d_z_TX: the gate's gradient, an output; None without a gate.
    d_reads: for each gate the gradient of the reads that it multiplies, [T, X], outputs.
    d_gates: the gradient of each gate, that of a low-rank one before its activation, outputs.
    d_after: for each source the gradient of the state after each chunk, [G, N, X], outputs.
    d_initial: for each source the gradient of its first state, [X, N], outputs; None where the
      state was zero.
  """
  decays = [Decays(plan, stream, count_T) for stream in streams]
  count = plan.chunks * plan.tiles

  def step(index: Array, states: States) -> States:
    tile = count - 1 - index
    rows, first = plan.rows(tile), tile * plan.tile
    last = first + plan.tile - 1

    @pl.when(rem(tile, plan.tiles) == plan.tiles - 1)
    def _save() -> None:
      for d_GNX, pieces in zip(d_after, states, strict=True):
        for start, dh_NX in zip(plan.pieces, pieces, strict=True):
          d_GNX[div(tile, plan.tiles), pl.ds(start, plan.piece), :] = dh_NX.astype(d_GNX.dtype)

    d_TX = d_out_TX[rows, :].astype(jnp.float32)
    if z_TX is not None:
      z, y = z_TX[rows, :].astype(jnp.float32), open_TX[rows, :].astype(jnp.float32)
      share = sigmoid(z)
      d_TX = _with_moments(d_TX, y * z * share, d_moments_2T, rows)
      d_z_TX[rows, :] = (d_TX * y * share * (1 + z * (1 - share))).astype(d_z_TX.dtype)
      d_TX *= z * share
    elif d_moments_2T is not None:
      d_TX = _with_moments(d_TX, open_TX[rows, :].astype(jnp.float32), d_moments_2T, rows)
    if d_y_TX is not None:
      d_TX = _stored(d_TX, d_y_TX, rows)
    gated = []
    for gate, read_TX, d_read_TX, d_gate_TX in zip(gates, reads, d_reads, d_gates, strict=True):
      factor_TX, slope_TX = open_gate(plan, gate, rows)
      d_factor_TX = d_TX * read_TX[rows, :].astype(jnp.float32)
      if slope_TX is not None:
        d_factor_TX *= slope_TX
      d_gate_TX[rows, :] = d_factor_TX.astype(d_gate_TX.dtype)
      gated.append(_stored(d_TX * factor_TX, d_read_TX, rows))
    before = []
    for number, stream, decay, dh in zip(plan.gates, streams, decays, states, strict=True):
      d_read = d_TX if number is None else gated[number]
      d_carried_TX = decay.since(first, rows)[:, None] * d_read
      whole = decay.since(first, last)
      q = plan.load(stream.q_BTK, rows)
      before.append(tuple(
          whole * dh_NX + plan.dot(q_TN, d_carried_TX, (0, 0))
          for dh_NX, q_TN in zip(dh, q, strict=True)
      ))
    return tuple(before)

  finals = (d_final_XN, *[None] * (len(streams) - 1))
  states = tuple(_initial(plan, d_XN) for d_XN in finals)
  states = jax.lax.fori_loop(0, count, step, states)
  for d_XN, dh in zip(d_initial, states, strict=True):
    if d_XN is not None:
      for start, dh_NX in zip(plan.pieces, dh, strict=True):
        d_XN[:, pl.ds(start, plan.piece)] = dh_NX.T


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
