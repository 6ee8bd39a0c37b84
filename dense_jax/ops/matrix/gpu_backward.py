"""The GPU kernel of gradients inside chunks.

A program takes one tile of a row and all heads of a group, part by part: so it sums the gradients
of the keys and queries that they share. It reads the tile as queries, against the tiles before it
in its chunk, and as keys, against those after it. Arguments of type PyTree, Stream or Epilogue are
references to the group's blocks of the arrays, all tokens of the row.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matrix.gpu_scan import result_gradient
from dense_jax.ops.matrix.gpu_tiles import Decays, Plan, Stream, div, rem, scaled, sigmoid
from dense_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSums:
  """Sums over one part's channels X for one source, float32, as references or arrays [B, H, A, T].

  Attributes:
    read: of the gradient of the read times the read.
    value: of the scaled value times its gradient.
    scale: of the value times the gradient of the scaled value; None without a scale.
  """

  read: PyTree
  value: PyTree
  scale: PyTree


@dataclasses.dataclass(frozen=True)
class _Part:
  """One part of one head of the program's group."""

  plan: Plan
  number: Array

  @property
  def head(self) -> Array:
    return div(self.number, self.plan.parts)

  @property
  def index(self) -> tuple[Array, Array]:
    """The head and its part."""
    return self.head, rem(self.number, self.plan.parts)

  @property
  def channels(self) -> PyTree:
    """The part's channels among those of the group."""
    return pl.ds(self.number * self.plan.width, self.plan.width)

  def state(self, h_GHNP: PyTree, chunk: Array) -> list[Array]:
    """Loads the pieces [piece, X] of a state."""
    plan = self.plan
    channels = pl.ds(rem(self.number, plan.parts) * plan.width, plan.width)
    return [
        h_GHNP[chunk, self.head, pl.ds(start, plan.piece), channels] for start in plan.pieces
    ]

  def decays(self, stream: Stream, count_T: PyTree) -> Decays:
    return Decays(self.plan, stream, count_T, (self.head,))

  def values(self, stream: Stream, rows: PyTree) -> Array:
    """Returns the scaled values of some tokens."""
    scale_T = None if stream.scale_BHT is None else stream.scale_BHT[self.head, rows]
    return scaled(self.plan, stream.v_BTE[rows, self.channels], scale_T)


@dataclasses.dataclass(frozen=True)
class _Program:
  """The program's tile, and what all its parts are computed from.

  Attributes:
    plan: the sizes.
    streams: the sources.
    gates: gates of reads.
    count_T: resets up to each token, inclusive; None means none.
    d_y_TU: the gradient of the sum of reads.
    tile: the tile.
  """

  plan: Plan
  streams: tuple[Stream, ...]
  gates: tuple[PyTree, ...]
  count_T: PyTree
  d_y_TU: PyTree
  tile: Array

  @property
  def chunk(self) -> Array:
    return div(self.tile, self.plan.tiles)

  @property
  def first(self) -> Array:
    """The first token of the chunk."""
    return self.chunk * self.plan.chunk

  @property
  def last(self) -> Array:
    """The last token of the chunk."""
    return self.first + self.plan.chunk - 1

  def at(self, offset: int) -> Array:
    """Returns a tile near the program's, or some tile if there is none."""
    return jnp.clip(self.tile + offset, 0, self.plan.chunks * self.plan.tiles - 1)

  def keys(self) -> range:
    """Offsets of tiles whose keys the program's queries may see."""
    return range(0, -self.plan.tiles, -1)

  def queries(self) -> range:
    """Offsets of tiles whose queries may see the program's keys."""
    return range(self.plan.tiles)

  def d_read(self, source: int, part: _Part, rows: PyTree) -> Array:
    """Returns the gradient of a source's read, rounded to the dtype of matmuls.

    Every use of it is rounded alike, so that terms of the decays' gradients cancel.
    """
    d_TX = self.d_y_TU[rows, part.channels].astype(jnp.float32)
    if self.plan.gates[source] is not None:
      d_TX *= self.gates[self.plan.gates[source]][rows, part.channels].astype(jnp.float32)
    return d_TX.astype(self.plan.dtype)

  def scores(self, source: int, query: Array, key: Array) -> Array:
    """Returns the products [Q, S] of queries and keys of two tiles."""
    plan, stream = self.plan, self.streams[source]
    return plan.summed_dot(
        plan.load(stream.q_BTK, plan.rows(query)), plan.load(stream.k_BTK, plan.rows(key)), (1, 1)
    )

  def each_part(self, body: Callable[[_Part, PyTree], PyTree], carry: PyTree) -> PyTree:
    """Calls body(part, carry) for each part of each head in turn."""
    plan = self.plan
    return jax.lax.fori_loop(
        0, plan.per_group * plan.parts, lambda number, carry: body(_Part(plan, number), carry),
        carry,
    )

  def zeros_keys(self) -> tuple[Array, ...]:
    plan = self.plan
    return tuple(jnp.zeros((plan.tile, plan.piece), jnp.float32) for _ in plan.pieces)

  def zeros_scores(self) -> tuple[Array, ...]:
    size = self.plan.tile
    return tuple(jnp.zeros((size, size), jnp.float32) for _ in self.keys())


def _itself(plan: Plan) -> Array:
  """Returns a bool mask [Q, S], true where a query's token is the key's."""
  size = (plan.tile, plan.tile)
  return jax.lax.broadcasted_iota(jnp.int32, size, 0) == jax.lax.broadcasted_iota(
      jnp.int32, size, 1
  )


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
    streams: tuple[Stream, ...],
    gates: tuple[PyTree, ...],
    epilogue: Epilogue,
    count_T: PyTree,
    out_TU: PyTree,
    d_out_TU: PyTree,
    d_moments_H2T: PyTree,
    d_y_TU: PyTree,
    before: Sequence[PyTree],
    d_after: Sequence[PyTree],
    d_streams: tuple[Stream, ...],
    d_gates: tuple[PyTree, ...],
    d_epilogue: Epilogue,
    sums: tuple[TokenSums, ...],
    d_last: Sequence[PyTree],
    d_whole: Sequence[PyTree],
) -> None:
  """Computes the gradients of a tile. `d_` is a gradient.

  The summed log decay of a token enters as exp(sum) in the token's read and as exp(-sum) with its
  value. So its gradient is <d_read, read> - <v, d_v> of that token, which needs no product of
  [C, C] arrays; the sum of a chunk's last token also enters the state after the chunk. Terms that
  no decay multiplies (a token's value in its own read, the last token's value in that state) would
  cancel up to rounding, which may far exceed the gradients of strong decays: both omit them.

  Args:
    plan: the sizes.
    streams: the sources.
    gates: gates of reads.
    epilogue: the epilogue's arrays.
    count_T: resets up to each token, inclusive; None means none.
    out_TU: the epilogue's result; None if it is not needed.
    d_out_TU: its gradient.
    d_moments_H2T: the gradient of its moments; None means zero.
    d_y_TU: the gradient of the sum of reads.
    before: each source's states before each chunk, [G, H, N, P].
    d_after: the gradients of the states after each chunk.
    d_streams: the sources' gradients but those of decays, scales and states, outputs.
    d_gates: the gates' gradients, outputs.
    d_epilogue: the epilogue's gradients, outputs; that of `skip` is this tile's share, [H, A].
    sums: for each source the sums that gradients of decays and scales need, outputs.
    d_last: for each source the part of the last token's gradient that this tile's values in the
      state after the chunk make, [H, A], outputs.
    d_whole: the part that the state before the chunk makes there, [H, A], outputs.
  """
  program = _Program(plan, streams, gates, count_T, d_y_TU, pl.program_id(1))
  _reads(
      program, epilogue, (out_TU, d_out_TU, d_moments_H2T), before, d_gates, d_epilogue,
      [sum_.read for sum_ in sums],
  )
  for source in range(len(streams)):
    _queries(program, source, before[source], d_streams[source].q_BTK)
    _keys(program, source, d_after[source], d_streams[source].k_BTK)
    _values(
        program, source, epilogue, d_after[source], d_streams[source].v_BTE, sums[source],
        d_last[source],
    )
    _whole_chunk(program, source, before[source], d_after[source], d_whole[source])


def _reads(
    program: _Program,
    epilogue: Epilogue,
    results: tuple[PyTree, PyTree, PyTree],
    before: Sequence[PyTree],
    d_gates: tuple[PyTree, ...],
    d_epilogue: Epilogue,
    read_sums: Sequence[PyTree],
) -> None:
  """Computes the reads again, and the gradients of gates and of the epilogue."""
  plan, streams = program.plan, program.streams
  tile = program.tile
  rows = plan.rows(tile)
  scores = [
      [program.scores(source, tile, program.at(offset)) for offset in program.keys()]
      for source in range(len(streams))
  ]

  def body(part: _Part, carry: PyTree) -> PyTree:
    d_y_TX = program.d_y_TU[rows, part.channels].astype(jnp.float32)
    y_TX = jnp.zeros_like(d_y_TX)
    d_gate = [None] * len(d_gates)
    for source, stream in enumerate(streams):
      decays = part.decays(stream, program.count_T)
      q = plan.load(stream.q_BTK, rows)
      read_TX = decays.since(program.first, rows)[:, None] * plan.summed_dot(
          q, part.state(before[source], program.chunk), (1, 0)
      )
      for offset, scores_QS in zip(program.keys(), scores[source], strict=True):
        key = program.at(offset)
        decay_QS = decays.between(tile, tile + offset, same=not offset)
        weights_QS = _weights(plan, scores_QS, decay_QS, offset)
        read_TX += plan.dot(weights_QS, part.values(stream, plan.rows(key)), (1, 0))
      d_read_TX = program.d_read(source, part, rows).astype(jnp.float32)
      read_sums[source][(*part.index, rows)] = jnp.sum(d_read_TX * read_TX, axis=1)
      v_TX = part.values(stream, rows).astype(jnp.float32)
      read_TX += _own_score(plan, scores[source][0])[:, None] * v_TX
      gate = plan.gates[source]
      if gate is None:
        y_TX += read_TX
      else:
        y_TX += program.gates[gate][rows, part.channels].astype(jnp.float32) * read_TX
        d_gate[gate] = read_TX if d_gate[gate] is None else d_gate[gate] + read_TX
    for d_gate_TU, reads_TX in zip(d_gates, d_gate, strict=True):
      d_gate_TU[rows, part.channels] = (d_y_TX * reads_TX).astype(d_gate_TU.dtype)

    if epilogue.skip is not None:
      x_TU = streams[0].v_BTE if epilogue.x is None else epilogue.x
      x_TX, skip = x_TU[rows, part.channels].astype(jnp.float32), epilogue.skip[part.head]
      y_TX += skip * x_TX
      d_epilogue.skip[part.index] = jnp.sum(d_y_TX * x_TX)
      if d_epilogue.x is not None:
        d_epilogue.x[rows, part.channels] = (skip * d_y_TX).astype(d_epilogue.x.dtype)
    if epilogue.z is not None:
      d_TX = result_gradient(*results, rows, part.channels, (part.head,))
      z_TX = epilogue.z[rows, part.channels].astype(jnp.float32)
      open_TX = sigmoid(z_TX)
      d_z_TX = d_TX * y_TX * open_TX * (1 + z_TX * (1 - open_TX))
      d_epilogue.z[rows, part.channels] = d_z_TX.astype(d_epilogue.z.dtype)
    return carry

  program.each_part(body, 0)


def _queries(program: _Program, source: int, before_GHNP: PyTree, d_q_TN: PyTree) -> None:
  """Computes the gradient of a source's queries."""
  plan, stream = program.plan, program.streams[source]
  tile = program.tile
  rows = plan.rows(tile)

  def body(part: _Part, carry: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
    d_scores, d_q = carry
    decays = part.decays(stream, program.count_T)
    d_read_TX = program.d_read(source, part, rows)
    d_scores = tuple(
        d_QS + decays.between(tile, tile + offset, same=not offset) * plan.dot(
            d_read_TX, part.values(stream, plan.rows(program.at(offset))), (1, 1)
        )
        for d_QS, offset in zip(d_scores, program.keys(), strict=True)
    )
    from_start_T = decays.since(program.first, rows)
    d_carried_TX = from_start_T[:, None] * d_read_TX.astype(jnp.float32)
    h = part.state(before_GHNP, program.chunk)
    d_q = tuple(
        d_TN + plan.dot(d_carried_TX, h_NX, (1, 1)) for d_TN, h_NX in zip(d_q, h, strict=True)
    )
    return d_scores, d_q

  d_scores, d_q = program.each_part(body, (program.zeros_scores(), program.zeros_keys()))
  for offset, d_QS in zip(program.keys(), d_scores, strict=True):
    k = plan.load(stream.k_BTK, plan.rows(program.at(offset)))
    d_q = tuple(d_TN + plan.dot(d_QS, k_TN, (1, 0)) for d_TN, k_TN in zip(d_q, k, strict=True))
  for start, d_TN in zip(plan.pieces, d_q, strict=True):
    d_q_TN[rows, pl.ds(start, plan.piece)] = d_TN.astype(d_q_TN.dtype)


def _values(
    program: _Program,
    source: int,
    epilogue: Epilogue,
    d_after_GHNP: PyTree,
    d_v_TU: PyTree,
    sums: TokenSums,
    d_last_HA: PyTree,
) -> None:
  """Computes the gradient of a source's values, and the sums that need it."""
  plan, stream = program.plan, program.streams[source]
  tile = program.tile
  rows, last = plan.rows(tile), program.last
  is_last_T1 = (
      tile * plan.tile + jax.lax.broadcasted_iota(jnp.int32, (plan.tile, 1), 0) == last
  )
  scores = [program.scores(source, program.at(offset), tile) for offset in program.queries()]
  own_T1 = _own_score(plan, scores[0])[:, None]

  def body(part: _Part, carry: PyTree) -> PyTree:
    decays = part.decays(stream, program.count_T)
    k, dh = plan.load(stream.k_BTK, rows), part.state(d_after_GHNP, program.chunk)
    d_kept_TX = decays.to(last, rows)[:, None] * plan.summed_dot(k, dh, (1, 0))
    v_TX = part.values(stream, rows).astype(jnp.float32)
    d_v_TX = jnp.where(is_last_T1, 0.0, d_kept_TX)
    d_last_HA[part.index] = jnp.sum(v_TX * d_v_TX)
    for offset, scores_QS in zip(program.queries(), scores, strict=True):
      d_read_TX = program.d_read(source, part, plan.rows(program.at(offset)))
      weights_QS = _weights(plan, scores_QS, decays.between(tile + offset, tile, same=not offset), offset)
      d_v_TX += plan.dot(weights_QS, d_read_TX, (0, 0))
    sums.value[(*part.index, rows)] = jnp.sum(v_TX * d_v_TX, axis=1)
    d_v_TX += jnp.where(is_last_T1, d_kept_TX, 0.0)
    d_v_TX += own_T1 * program.d_read(source, part, rows).astype(jnp.float32)
    if stream.scale_BHT is not None:
      raw_TX = stream.v_BTE[rows, part.channels].astype(jnp.float32)
      sums.scale[(*part.index, rows)] = jnp.sum(raw_TX * d_v_TX, axis=1)
      d_v_TX *= stream.scale_BHT[part.head, rows][:, None]
    if source == 0 and epilogue.skip is not None and epilogue.x is None:
      d_y_TX = program.d_y_TU[rows, part.channels].astype(jnp.float32)
      d_v_TX += epilogue.skip[part.head] * d_y_TX
    d_v_TU[rows, part.channels] = d_v_TX.astype(d_v_TU.dtype)
    return carry

  program.each_part(body, 0)


def _whole_chunk(
    program: _Program, source: int, before_GHNP: PyTree, d_after_GHNP: PyTree, d_whole_HA: PyTree
) -> None:
  """Computes the gradient of the chunk's whole decay, in the program of the chunk's last tile."""
  plan, stream = program.plan, program.streams[source]
  ends_chunk = rem(program.tile, plan.tiles) == plan.tiles - 1

  def body(part: _Part, carry: PyTree) -> PyTree:
    decays = part.decays(stream, program.count_T)
    h, dh = (part.state(x, program.chunk) for x in (before_GHNP, d_after_GHNP))
    product = sum(
        jnp.sum(h_NX.astype(jnp.float32) * dh_NX.astype(jnp.float32))
        for h_NX, dh_NX in zip(h, dh, strict=True)
    )
    d_whole_HA[part.index] = decays.since(program.first, program.last) * product
    return carry

  @pl.when(ends_chunk)
  def _last_tile() -> None:
    program.each_part(body, 0)


def _keys(program: _Program, source: int, d_after_GHNP: PyTree, d_k_TN: PyTree) -> None:
  """Computes the gradient of a source's keys."""
  plan, stream = program.plan, program.streams[source]
  tile = program.tile
  rows = plan.rows(tile)

  def body(part: _Part, carry: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
    d_scores, d_k = carry
    decays = part.decays(stream, program.count_T)
    v_TX = part.values(stream, rows)
    d_scores = tuple(
        d_QS + decays.between(tile + offset, tile, same=not offset) * plan.dot(
            program.d_read(source, part, plan.rows(program.at(offset))), v_TX, (1, 1)
        )
        for d_QS, offset in zip(d_scores, program.queries(), strict=True)
    )
    kept_TX = decays.to(program.last, rows)[:, None] * v_TX.astype(jnp.float32)
    dh = part.state(d_after_GHNP, program.chunk)
    d_k = tuple(
        d_TN + plan.dot(kept_TX, dh_NX, (1, 1)) for d_TN, dh_NX in zip(d_k, dh, strict=True)
    )
    return d_scores, d_k

  d_scores, d_k = program.each_part(body, (program.zeros_scores(), program.zeros_keys()))
  for offset, d_QS in zip(program.queries(), d_scores, strict=True):
    q = plan.load(stream.q_BTK, plan.rows(program.at(offset)))
    d_k = tuple(d_TN + plan.dot(d_QS, q_TN, (0, 0)) for d_TN, q_TN in zip(d_k, q, strict=True))
  for start, d_TN in zip(plan.pieces, d_k, strict=True):
    d_k_TN[rows, pl.ds(start, plan.piece)] = d_TN.astype(d_k_TN.dtype)
