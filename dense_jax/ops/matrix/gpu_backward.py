"""The GPU kernel of gradients inside chunks; `gpu_program` says what its programs are.

Arguments of type PyTree, Stream or Epilogue are references to the group's blocks of the arrays, all
tokens of the row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.gpu_plan import Plan, Stream
from dense_jax.ops.matrix.gpu_program import Part, PartSums, Program, TokenSums
from dense_jax.types import Array, PyTree


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
  """Computes one source's gradients in a chunk. `d_` is a gradient.

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
    before_GHNP: states before each chunk; None if the source joins another one, which reads them.
    d_after_GHNP: the gradients of the states after each chunk.
    d_stream: gradients of queries, keys and values, outputs.
    d_x_TU: the gradient of what `skip` multiplies, an output; None if that is the values.
    sums: sums that gradients of decays and scales need, outputs.
    parts: shares of gradients, outputs.
  """
  program = Program(plan, stream, count_T, d_read_TU, pl.program_id(1))
  d_y_TU = d_read_TU if d_y_TU is None else d_y_TU
  rows = program.rows
  scores_QS = program.scores()
  own_T1 = jnp.sum(jnp.where(_itself(plan), scores_QS, 0.0), axis=1)[:, None]

  def of_scores(part: Part, d_scores_QS: Array) -> Array:
    decay_QS = program.decays(part).within(program.chunk)
    weights_QS = jnp.where(_itself(plan), 0.0, scores_QS * decay_QS).astype(plan.dtype)
    d_read_TX = program.d_read(part)
    d_weights_QS = plan.dot(d_read_TX, program.values(part), (1, 1))
    sums.read[(*part.index, 0, rows)] = jnp.sum(weights_QS * d_weights_QS, axis=1)
    d_within_TX = plan.dot(weights_QS, d_read_TX, (0, 0))
    _values(program, part, epilogue, d_y_TU, d_after_GHNP, (d_within_TX, own_T1),
            d_stream.v_BTE, d_x_TU, sums, parts)
    return d_scores_QS + decay_QS * d_weights_QS

  def of_keys(number: int, part: Part, d_TN: tuple[Array, Array]) -> tuple[Array, Array]:
    decays, piece = program.decays(part), pl.ds(plan.pieces[number], plan.piece)
    # In this order: with both decays before the product, or the second one after the query's
    # gradient, N 256 takes 52 bytes more of shared memory than an H100 has.
    h_NX = None if before_GHNP is None else part.state(before_GHNP, program.chunk, piece)
    dh_NX = part.state(d_after_GHNP, program.chunk, piece)
    if h_NX is not None:
      product = jnp.sum(h_NX.astype(jnp.float32) * dh_NX.astype(jnp.float32))
      parts.whole[(*part.index, number)] = decays.whole(program.chunk) * product
    from_start_T1, to_end_T1 = (
        decay_T[:, None]
        for decay_T in (decays.from_start(program.chunk), decays.to_end(program.chunk))
    )
    d_q_TN = d_TN[0]
    if h_NX is not None:
      d_carried_TX = from_start_T1 * program.d_read(part).astype(jnp.float32)
      added_TN = plan.dot(d_carried_TX, h_NX, (1, 1))
      q_TN = stream.q_BTK[rows, piece].astype(jnp.float32)
      sums.read[(*part.index, 1 + number, rows)] = jnp.sum(q_TN * added_TN, axis=1)
      d_q_TN += added_TN
    kept_TX = to_end_T1 * program.values(part).astype(jnp.float32)
    return d_q_TN, d_TN[1] + plan.dot(kept_TX, dh_NX, (1, 1))

  zeros_TN = jnp.zeros((plan.chunk, plan.piece), jnp.float32)
  zeros_QS = jnp.zeros((plan.chunk, plan.chunk), jnp.float32)
  # With the first piece of the keys, for it takes the same loads.
  d_scores_QS, *d_first = program.each_part(
      lambda part, carry: (of_scores(part, carry[0]), *of_keys(0, part, carry[1:])),
      (zeros_QS, zeros_TN, zeros_TN),
  )
  for number, start in enumerate(plan.pieces):
    d_TN = d_first if not number else program.each_part(
        functools.partial(of_keys, number), (zeros_TN, zeros_TN)
    )
    piece = pl.ds(start, plan.piece)
    d_q_TN = d_TN[0] + plan.dot(d_scores_QS, stream.k_BTK[rows, piece], (1, 0))
    d_k_TN = d_TN[1] + plan.dot(d_scores_QS, stream.q_BTK[rows, piece], (0, 0))
    d_stream.q_BTK[rows, piece] = d_q_TN.astype(d_stream.q_BTK.dtype)
    d_stream.k_BTK[rows, piece] = d_k_TN.astype(d_stream.k_BTK.dtype)


def _itself(plan: Plan) -> Array:
  """Returns a bool mask [Q, S], true where a query's token is the key's."""
  size = (plan.chunk, plan.chunk)
  q_QS, s_QS = (jax.lax.broadcasted_iota(jnp.int32, size, axis) for axis in range(2))
  return q_QS == s_QS


def _values(
    program: Program,
    part: Part,
    epilogue: Epilogue | None,
    d_y_TU: PyTree,
    d_after_GHNP: PyTree,
    within: tuple[Array, Array],
    d_v_TU: PyTree,
    d_x_TU: PyTree,
    sums: TokenSums,
    parts: PartSums,
) -> None:
  """Computes a part's gradients of the values and of the skip connection, and sums of them.

  Args:
    program: the program.
    part: the part.
    epilogue: skip and what it multiplies; None if another source than the layer's own.
    d_y_TU: the gradient of the sum of reads.
    d_after_GHNP: the gradients of the states after each chunk.
    within: what later tokens of the chunk add to the values' gradients, [T, X], and each token's
      score for itself, [T, 1].
    d_v_TU: the gradient of the values, an output.
    d_x_TU: the gradient of what `skip` multiplies, an output; None if that is the values.
    sums: outputs.
    parts: outputs.
  """
  plan, stream, rows = program.plan, program.stream, program.rows
  place_T1 = jax.lax.broadcasted_iota(jnp.int32, (plan.chunk, 1), 0)
  is_last_T1 = place_T1 == plan.end(program.chunk)
  d_within_TX, own_T1 = within
  k, dh = plan.load(stream.k_BTK, rows), part.states(d_after_GHNP, program.chunk)
  to_end_T1 = program.decays(part).to_end(program.chunk)[:, None]
  d_kept_TX = to_end_T1 * plan.summed_dot(k, dh, (1, 0))
  v_TX = program.values(part).astype(jnp.float32)
  d_v_TX = jnp.where(is_last_T1, 0.0, d_kept_TX)
  parts.last[part.index] = jnp.sum(v_TX * d_v_TX)
  d_v_TX += d_within_TX
  sums.value[(*part.index, rows)] = jnp.sum(v_TX * d_v_TX, axis=1)
  d_v_TX += jnp.where(is_last_T1, d_kept_TX, 0.0)
  d_v_TX += own_T1 * program.d_read(part).astype(jnp.float32)
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
