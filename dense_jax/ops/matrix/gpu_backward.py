"""The GPU kernel of gradients inside chunks; `gpu_program` says what its programs are.

Arguments of type PyTree, Stream or Epilogue are references to the group's blocks of the arrays, all
tokens of the row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.gpu_program import Part, PartSums, Program, TokenSums
from dense_jax.ops.matrix.gpu_tiles import Plan, Stream, rem
from dense_jax.types import Array, PyTree


def _itself(plan: Plan) -> Array:
  """Returns a bool mask [Q, S], true where a query's token is the key's."""
  size = (plan.tile, plan.tile)
  q_QS, s_QS = (jax.lax.broadcasted_iota(jnp.int32, size, axis) for axis in range(2))
  return q_QS == s_QS


def _weights(plan: Plan, scores_QS: Array, decay_QS: Array, offset: int) -> Array:
  """Returns scores * decay without a token's weight for itself, rounded."""
  weights_QS = scores_QS * decay_QS
  if offset == 0:
    weights_QS = jnp.where(_itself(plan), 0.0, weights_QS)
  return weights_QS.astype(plan.dtype)


def _own_score(plan: Plan, scores_QS: Array) -> Array:
  """Returns each token's score for itself, [T]; its decay is 1."""
  return jnp.sum(jnp.where(_itself(plan), scores_QS, 0.0), axis=1)


def chunks_backward_kernel(
    plan: Plan,
    stream: Stream,
    epilogue: Epilogue | None,
    count_T: PyTree,
    d_read_TU: PyTree,
    d_y_TU: PyTree,
    before_GHNP: PyTree,
    d_after_GHNP: PyTree,
    d_stream: Stream,
    d_x_TU: PyTree,
    sums: TokenSums,
    parts: PartSums,
) -> None:
  """Computes one source's gradients in a tile. `d_` is a gradient.

  The summed log decay of a token enters as exp(sum) in the token's read and as exp(-sum) with its
  value. So its gradient is <d_read, read> - <v, d_v> of that token; the sum of a chunk's last token
  also enters the state after the chunk. Neither read nor d_read is needed twice: <d_read, read> is
  the sum of weights times their gradients, and of the query times its gradient, which the query's
  gradient is made of. Terms that no decay multiplies (a token's value in its own read, the last
  token's value in that state) would cancel up to rounding, which may far exceed the gradients of
  strong decays: both sums omit them.

  Args:
    plan: the sizes.
    stream: the source.
    epilogue: skip and what it multiplies; None if another source than the layer's own.
    count_T: resets up to each token, inclusive; None means none.
    d_read_TU: the gradient of the read.
    d_y_TU: the gradient of the sum of reads, for `epilogue`; None if it is `d_read_TU`.
    before_GHNP: states before each chunk.
    d_after_GHNP: the gradients of the states after each chunk.
    d_stream: gradients of queries, keys and values, outputs.
    d_x_TU: the gradient of what `skip` multiplies, an output; None if that is the values.
    sums: sums that gradients of decays and scales need, outputs.
    parts: shares of gradients, outputs.
  """
  program = Program(plan, stream, count_T, d_read_TU, pl.program_id(1))
  d_y_TU = d_read_TU if d_y_TU is None else d_y_TU
  d_scores_QS = _queries(program, before_GHNP, d_stream.q_BTK, sums.read)
  _keys(program, d_after_GHNP, d_scores_QS.T, d_stream.k_BTK)
  _values(program, epilogue, d_y_TU, d_after_GHNP, d_stream.v_BTE, d_x_TU, sums, parts)
  _whole_chunk(program, before_GHNP, d_after_GHNP, parts.whole)


def _queries(
    program: Program, before_GHNP: PyTree, d_q_TN: PyTree, sums_HAOT: PyTree
) -> Array:
  """Computes the gradient of the queries, and the sums of the read times its gradient.

  Returns:
    The gradient of the tile's scores with its own keys, rounded to the dtype of matmuls.
  """
  plan, tile, rows = program.plan, program.tile, program.rows

  def within(offset: int, none_QS: Array) -> Array:
    key = program.at(offset)
    scores_QS = program.scores(tile, key)

    def body(part: Part, d_scores_QS: Array) -> Array:
      decay_QS = program.decays(part).between(tile, tile + offset, same=not offset)
      weights_QS = _weights(plan, scores_QS, decay_QS, offset).astype(jnp.float32)
      d_weights_QS = plan.dot(program.d_read(part, tile), program.values(part, key), (1, 1))
      sums_HAOT[(*part.index, -offset, rows)] = jnp.sum(weights_QS * d_weights_QS, axis=1)
      return d_scores_QS + decay_QS * d_weights_QS

    return program.each_part(body, none_QS)

  d_scores = program.at_each(program.earlier, within, plan.dtype)
  for number, start in enumerate(plan.pieces):
    piece = pl.ds(start, plan.piece)

    def carried(part: Part, d_TN: Array, number: int = number, piece: PyTree = piece) -> Array:
      from_start_T1 = program.decays(part).since(program.first, rows)[:, None]
      d_carried_TX = from_start_T1 * program.d_read(part, tile).astype(jnp.float32)
      added_TN = plan.dot(d_carried_TX, part.state(before_GHNP, program.chunk, piece), (1, 1))
      q_TN = program.stream.q_BTK[rows, piece].astype(jnp.float32)
      sums_HAOT[(*part.index, plan.tiles + number, rows)] = jnp.sum(q_TN * added_TN, axis=1)
      return d_TN + added_TN

    d_TN = program.each_part(carried, program.zeros_keys())
    d_TN = program.products(d_TN, program.earlier, d_scores, program.stream.k_BTK, piece)
    d_q_TN[rows, piece] = d_TN.astype(d_q_TN.dtype)
  return d_scores[0]


def _keys(
    program: Program, d_after_GHNP: PyTree, d_scores_SQ: Array, d_k_TN: PyTree
) -> None:
  """Computes the gradient of the keys, from that of the tile's scores with its own queries."""
  plan, tile, rows = program.plan, program.tile, program.rows

  def within(offset: int, none_SQ: Array) -> Array:
    query = program.at(offset)

    def body(part: Part, d_scores_SQ: Array) -> Array:
      decay_SQ = program.decays(part).between(
          tile + offset, tile, same=False, keys_first=True
      )
      v_TX, d_read_TX = program.values(part, tile), program.d_read(part, query)
      return d_scores_SQ + decay_SQ * plan.dot(v_TX, d_read_TX, (1, 1))

    return program.each_part(body, none_SQ)

  d_scores = [d_scores_SQ, *program.at_each(program.later[1:], within, plan.dtype)]
  for start in plan.pieces:
    piece = pl.ds(start, plan.piece)

    def kept(part: Part, d_TN: Array, piece: PyTree = piece) -> Array:
      to_end_T1 = program.decays(part).to(program.last, rows)[:, None]
      kept_TX = to_end_T1 * program.values(part, tile).astype(jnp.float32)
      return d_TN + plan.dot(kept_TX, part.state(d_after_GHNP, program.chunk, piece), (1, 1))

    d_TN = program.each_part(kept, program.zeros_keys())
    d_TN = program.products(d_TN, program.later, d_scores, program.stream.q_BTK, piece)
    d_k_TN[rows, piece] = d_TN.astype(d_k_TN.dtype)


def _values(
    program: Program,
    epilogue: Epilogue | None,
    d_y_TU: PyTree,
    d_after_GHNP: PyTree,
    d_v_TU: PyTree,
    d_x_TU: PyTree,
    sums: TokenSums,
    parts: PartSums,
) -> None:
  """Computes the gradients of the values and of the skip connection, and sums that need them.

  Scores of all tiles of the chunk are in registers at once, so its parts are narrow ones.
  """
  program = dataclasses.replace(program, plan=program.plan.narrow)
  plan, stream = program.plan, program.stream
  tile, rows, last = program.tile, program.rows, program.last
  is_last_T1 = (
      tile * plan.tile + jax.lax.broadcasted_iota(jnp.int32, (plan.tile, 1), 0) == last
  )

  def of_queries(offset: int, _: Array) -> Array:
    return program.scores(program.at(offset), tile, keys_first=True)

  scores = program.at_each(program.later, of_queries, jnp.dtype(jnp.float32))
  own_T1 = _own_score(plan, scores[0])[:, None]

  def body(part: Part, carry: PyTree) -> PyTree:
    decays = program.decays(part)
    k, dh = plan.load(stream.k_BTK, rows), part.states(d_after_GHNP, program.chunk)
    d_kept_TX = decays.to(last, rows)[:, None] * plan.summed_dot(k, dh, (1, 0))
    v_TX = program.values(part, tile).astype(jnp.float32)
    d_v_TX = jnp.where(is_last_T1, 0.0, d_kept_TX)
    parts.last[part.index] = jnp.sum(v_TX * d_v_TX)

    def added(d_v_TX: Array, offset: int, scores_SQ: Array) -> Array:
      decay_SQ = decays.between(tile + offset, tile, same=not offset, keys_first=True)
      weights_SQ = _weights(plan, scores_SQ, decay_SQ, offset)
      d_read_TX = program.d_read(part, program.at(offset))
      return d_v_TX + plan.dot(weights_SQ, d_read_TX, (1, 0))

    for offset, scores_SQ in zip(program.later, scores, strict=True):
      add = functools.partial(added, offset=offset, scores_SQ=scores_SQ)
      d_v_TX = program.if_in_chunk(offset, add, d_v_TX)
    sums.value[(*part.index, rows)] = jnp.sum(v_TX * d_v_TX, axis=1)
    d_v_TX += jnp.where(is_last_T1, d_kept_TX, 0.0)
    d_v_TX += own_T1 * program.d_read(part, tile).astype(jnp.float32)
    if stream.scale_BHT is not None:
      raw_TX = stream.v_BTE[rows, part.channels].astype(jnp.float32)
      sums.scale[(*part.index, rows)] = jnp.sum(raw_TX * d_v_TX, axis=1)
      d_v_TX *= stream.scale_BHT[part.head, rows][:, None]
    if epilogue is not None and epilogue.skip is not None:
      d_y_TX = d_y_TU[rows, part.channels].astype(jnp.float32)
      x_TU = stream.v_BTE if epilogue.x is None else epilogue.x
      parts.skip[part.index] = jnp.sum(d_y_TX * x_TU[rows, part.channels].astype(jnp.float32))
      d_x_TX = epilogue.skip[part.head] * d_y_TX
      if epilogue.x is None:
        d_v_TX += d_x_TX
      else:
        d_x_TU[rows, part.channels] = d_x_TX.astype(d_x_TU.dtype)
    d_v_TU[rows, part.channels] = d_v_TX.astype(d_v_TU.dtype)
    return carry

  program.each_part(body, 0)


def _whole_chunk(
    program: Program, before_GHNP: PyTree, d_after_GHNP: PyTree, d_whole_HA: PyTree
) -> None:
  """Computes the gradient of the chunk's whole decay, in the program of the chunk's last tile."""
  plan = program.plan

  def body(part: Part, carry: PyTree) -> PyTree:
    h, dh = (part.states(x_GHNP, program.chunk) for x_GHNP in (before_GHNP, d_after_GHNP))
    product = sum(
        jnp.sum(h_NX.astype(jnp.float32) * dh_NX.astype(jnp.float32))
        for h_NX, dh_NX in zip(h, dh, strict=True)
    )
    whole = program.decays(part).since(program.first, program.last)
    d_whole_HA[part.index] = whole * product
    return carry

  @pl.when(rem(program.tile, plan.tiles) == plan.tiles - 1)
  def _last_tile() -> None:
    program.each_part(body, 0)
