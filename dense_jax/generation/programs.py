"""The compiled programs of generation, each for one shape, whatever is read and drawn.

    read     one text, in chunks of few lengths
    decode   a fixed number of rows, token by token, until all are done or a limit is reached
    insert   puts a text that was read into a row; take is its inverse

A text is read by itself, and rows are decoded in a batch of one size, of which some may be idle.
So every number of a row comes from the same instructions, whatever the other rows hold: results
do not depend on them, not even by rounding.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.batch import Segments
from dense_jax.generation.requests import Prefix, Request
from dense_jax.generation.sampling import Sampling, Settings, penalized, sample
from dense_jax.generation.text import CONTEXT
from dense_jax.models.language_model import LanguageModel, ModelState
from dense_jax.models.params import decoding_params, unrolled, with_params
from dense_jax.ops import resolver
from dense_jax.types import Array, Params

# Lengths of the chunks in which a text is read: the longer ones first, each full but the last one.
CHUNKS = (512, 64)
# The most tokens of one call of `decode`. Between calls, the host sees the tokens and may stop.
BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """The texts that are being decoded, on the device.

  Attributes:
    state: the model's state.
    logits_BV: float32 logits of each row's next token.
    seen_BV: bool, the tokens that each row's text holds.
    stops_BV: bool, each row's stop ids.
    left_B: int32, the tokens that each row may still draw; 0 means that the row is idle or done.
    seed_B: uint32.
    settings: each row's sampling.
  """

  state: ModelState
  logits_BV: Array
  seen_BV: Array
  stops_BV: Array
  left_B: Array
  seed_B: Array
  settings: Settings


class Programs:
  """The compiled programs of one model; each is compiled on first use.

  Attributes:
    model: the model with every layer compiled apart.
    batch_size: B, the number of rows that are decoded together.
  """

  def __init__(self, model: LanguageModel, batch_size: int) -> None:
    """Unrolls the layers, once."""
    self.model = unrolled(model)
    self.batch_size = batch_size
    self._params = decoding_params(self.model)
    self._read = jax.jit(self._read_chunk)
    self._decode = jax.jit(
        self._decode_block, donate_argnums=1, compiler_options=resolver.decoding_options()
    )
    self._insert = jax.jit(_insert)
    self._take = jax.jit(
        lambda rows, row: (rows.state.rows(row[None]), rows.logits_BV[row], rows.seen_BV[row])
    )

  @property
  def params(self) -> Params:
    """The model's parameters, with every layer compiled apart; see `decoding_params`."""
    return self._params

  def read(self, ids: Sequence[int], prefix: Prefix | None = None) -> Prefix:
    """Reads a text after `prefix`, or from the beginning; memory does not grow with its length."""
    vocabulary = self.model.config.vocab_size
    if prefix is None:
      prefix = Prefix(
          self.model.init_state(1), jnp.zeros(vocabulary), jnp.zeros(vocabulary, bool), ()
      )
    state, logits_1V = prefix.state, prefix.logits_V[None]
    for tokens_1T, count in _chunks(ids):
      state, logits_1V = self._read(self._params, state, tokens_1T, count)
    seen_V = np.array(prefix.seen_V)
    seen_V[np.asarray(ids, np.int32)] = True
    last_ids = (*prefix.last_ids, *map(int, ids[-CONTEXT:]))[-CONTEXT:]
    return Prefix(state, logits_1V[0], jnp.asarray(seen_V), last_ids)

  def _read_chunk(
      self, params: Params, state: ModelState, tokens_1T: Array, count: Array
  ) -> tuple[ModelState, Array]:
    """Reads the first `count` tokens."""
    index_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
    segments = Segments(
        state.position_B[:, None] + index_1T, (index_1T < count).astype(jnp.int32)
    )
    return with_params(self.model, params).prefill(tokens_1T, segments, state)

  def empty(self) -> Rows:
    """Returns rows that are all idle."""
    shape = (self.batch_size, self.model.config.vocab_size)
    return Rows(
        self.model.init_state(self.batch_size), jnp.zeros(shape), jnp.zeros(shape, bool),
        jnp.zeros(shape, bool), jnp.zeros(shape[0], jnp.int32), jnp.zeros(shape[0], jnp.uint32),
        Settings.of([Sampling(temperature=0)] * shape[0]),
    )

  def insert(self, rows: Rows, row: int, prefix: Prefix, request: Request) -> Rows:
    """Puts a text that was read, with the settings of its continuation, into a row."""
    stops_V = np.zeros(self.model.config.vocab_size, bool)
    stops_V[np.asarray(request.stop_ids, np.int32)] = True
    one = Rows(
        prefix.state, prefix.logits_V[None], prefix.seen_V[None], jnp.asarray(stops_V)[None],
        jnp.asarray([request.max_new_tokens], jnp.int32), jnp.asarray([request.seed], jnp.uint32),
        Settings.of([request.sampling]),
    )
    return self._insert(rows, one, row)

  def take(self, rows: Rows, row: int, last_ids: Sequence[int]) -> Prefix:
    """Returns a row's text, of which these are the last ids."""
    state, logits_V, seen_V = self._take(rows, jnp.int32(row))
    return Prefix(state, logits_V, seen_V, tuple(last_ids)[-CONTEXT:])

  def decode(self, rows: Rows, limit: int = BLOCK) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Draws and reads tokens until every row is done, but at most `limit`.

    A row that is done goes on while others do not; its tokens have no meaning.

    Args:
      rows: the rows; their arrays must not be used afterwards.
      limit: from 1 to `BLOCK`.

    Returns:
      The rows after the last token, and each row's tokens and their log-probabilities, [B, T].
    """
    rows, tokens_TB, log_probs_TB, count = self._decode(
        self._params, rows, jnp.int32(min(limit, BLOCK))
    )
    count = int(count)
    return rows, np.asarray(tokens_TB)[:count].T, np.asarray(log_probs_TB)[:count].T

  def _decode_block(
      self, params: Params, rows: Rows, limit: Array
  ) -> tuple[Rows, Array, Array, Array]:
    model = with_params(self.model, params)
    index_B = jnp.arange(self.batch_size)

    def goes_on(carry: tuple[Array, Rows, Array, Array]) -> Array:
      time, rows, _, _ = carry
      return (time < limit) & jnp.any(rows.left_B > 0)

    def body(
        carry: tuple[Array, Rows, Array, Array]
    ) -> tuple[Array, Rows, Array, Array]:
      time, rows, tokens_TB, log_probs_TB = carry
      keys_B = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
          rows.seed_B, rows.state.position_B
      )
      logits_BV = penalized(rows.logits_BV, rows.seen_BV, rows.settings)
      tokens_B = sample(logits_BV, keys_B, rows.settings)
      log_probs_B = rows.logits_BV[index_B, tokens_B] - jax.nn.logsumexp(rows.logits_BV, axis=-1)
      state, logits_BV = model.step(rows.state, tokens_B)
      rows = dataclasses.replace(
          rows, state=state, logits_BV=logits_BV,
          seen_BV=rows.seen_BV.at[index_B, tokens_B].set(True, unique_indices=True),
          left_B=jnp.where(rows.stops_BV[index_B, tokens_B], 0, jnp.maximum(rows.left_B - 1, 0)),
      )
      tokens_TB = tokens_TB.at[time].set(tokens_B)
      return time + 1, rows, tokens_TB, log_probs_TB.at[time].set(log_probs_B)

    shape = (BLOCK, self.batch_size)
    time, rows, tokens_TB, log_probs_TB = jax.lax.while_loop(
        goes_on, body, (jnp.int32(0), rows, jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    )
    return rows, tokens_TB, log_probs_TB, time


def _insert(rows: Rows, one: Rows, row: Array) -> Rows:
  """Replaces a row by the only one of `one`."""
  return jax.tree.map(lambda leaf, new: leaf.at[row].set(new[0]), rows, one)


def _chunks(ids: Sequence[int]) -> Iterator[tuple[np.ndarray, np.int32]]:
  """Yields chunks of a text, int32 [1, T] with T of `CHUNKS`, and how many ids each holds.

  They depend on the number of ids alone.
  """
  start = 0
  while start < len(ids):
    left = len(ids) - start
    length = next((length for length in CHUNKS if length <= left), CHUNKS[-1])
    chunk = np.zeros((1, length), np.int32)
    part = ids[start : start + length]
    chunk[0, : len(part)] = part
    yield chunk, np.int32(len(part))
    start += length
