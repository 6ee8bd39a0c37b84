"""Compiled programs that read rows of tokens from a state, and score targets at some of them."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dense_jax import sharding
from dense_jax.batch import Batch, Segments
from dense_jax.config import ModelConfig
from dense_jax.models.language_model import ModelState
from dense_jax.models.params import abstract_model, with_params
from dense_jax.models.registry import family
from dense_jax.ops import resolver
from dense_jax.types import Array, Params

# Lengths to which rows may be padded. A row that is longer than the last is read in several calls.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# So many padded tokens are worth another program. Its compilation takes as long as reading some
# 6,000 (12 layers of width 512, families mamba and mamba2, on a CPU: 3.5 s against 0.5 to 0.8 ms a
# token), but is kept for all later evaluations of models of the same configuration.
WORTH_A_PROGRAM = 700
# Targets of a call of `Programs.score`, and how many of them have logits at one time.
TARGETS, CHUNK = 2048, 128


def choose_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
  """Chooses the padded lengths for rows of these lengths, from 1 to the last of `LENGTHS`.

  Each length that is used is a program to compile. The choice is the subset of `LENGTHS` for which
  the padded tokens and the compilations together cost the least.
  """
  below = [0, *(int((np.asarray(lengths, int) <= length).sum()) for length in LENGTHS)]
  # The least cost of all rows up to each length, and the lengths that it needs.
  best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
  for index, length in enumerate(LENGTHS, 1):
    best.append(min(
        (cost + (below[index] - below[start]) * length + WORTH_A_PROGRAM, (*chosen, length))
        if below[index] > below[start] else (cost, chosen)
        for start, (cost, chosen) in enumerate(best)
    ))
  return best[-1][1]


class Programs:
  """The programs of one model; they are compiled for each shape on first use.

  A row's numbers do not depend on what is in the other rows, nor on how much it is padded.
  """

  def __init__(self, config: ModelConfig) -> None:
    """Makes the programs; nothing is compiled yet."""
    model = abstract_model(config)

    def read(
        params: Params, parents: tuple[ModelState, Array] | None, tokens_BT: Array,
        segments: Segments, keep: bool,
    ) -> tuple[Array, ModelState | None]:
      state = None if parents is None else parents[0].rows(parents[1])
      hidden_BTD, after = with_params(model, params).hidden(tokens_BT, segments, state)
      return hidden_BTD, after if keep else None

    def take(hidden_BTD: Array, place_K: Array) -> Array:
      return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[place_K]

    def score(
        params: Params, hidden_KD: Array, target_K: Array, chunks: Array
    ) -> tuple[Array, Array]:
      loaded = with_params(model, params)

      def body(chunk: Array, scored: tuple[Array, Array]) -> tuple[Array, Array]:
        def part(x: Array) -> Array:
          return jax.lax.dynamic_slice_in_dim(x, chunk * CHUNK, CHUNK)

        values = _log_likelihood(loaded.logits(part(hidden_KD)), part(target_K))

        def put(whole: Array, value: Array) -> Array:
          return jax.lax.dynamic_update_slice_in_dim(whole, value, chunk * CHUNK, 0)

        return put(scored[0], values[0]), put(scored[1], values[1])

      fresh = jnp.zeros(TARGETS, jnp.float32), jnp.zeros(TARGETS, bool)
      return jax.lax.fori_loop(0, chunks, body, fresh)

    self._read: Callable[..., tuple[Array, ModelState]] = jax.jit(
        read, static_argnames="keep"
    )
    self._take: Callable[[Array, Array], Array] = jax.jit(take)
    self._score: Callable[..., tuple[Array, Array]] = jax.jit(score)
    self._has_cache = hasattr(config.mixer, "context")

  def read(
      self, params: Params, state: ModelState | None, index_B: np.ndarray, batch: Batch, *,
      keep: bool,
  ) -> tuple[Array, ModelState]:
    """Reads rows, each from a row of `state`.

    Args:
      params: the model's parameters.
      state: the states to go on from; None means that all rows begin a document.
      index_B: int32, the row of `state` from which each row goes on.
      batch: tokens and segments on the devices, padded on the right with segment id 0.
      keep: whether the state after the rows is wanted.

    Returns:
      The last norm's output hidden_BTD, and the state (perhaps None without `keep`).
    """
    parents = None if state is None else (state, everywhere(index_B, params))
    # To keep a state costs little, unless it is a cache; one program then serves both.
    keep = keep or (state is None and not self._has_cache)
    with sharding.mesh_of(params):
      return self._read(params, parents, batch.tokens_BT, batch.segments, keep=keep)

  def score(
      self, params: Params, hidden_BTD: Array, place_K: np.ndarray, target_K: np.ndarray
  ) -> tuple[Array, Array]:
    """Scores at most `TARGETS` targets.

    Args:
      params: the model's parameters.
      hidden_BTD: from `read`.
      place_K: int, row * T + time of the token that predicts each target.
      target_K: int, the targets.

    Returns:
      Log-probabilities in nats, float32, and whether each target is the most probable token; both
      [TARGETS], of which the first K are meant.
    """
    count = len(place_K)
    padded = np.zeros((2, TARGETS), np.int32)
    padded[0, :count], padded[1, :count] = place_K, target_K
    chunks = np.asarray(-(-count // CHUNK), np.int32)
    place, target, number = (everywhere(x, params) for x in (*padded, chunks))
    with sharding.mesh_of(params):
      return self._score(params, self._take(hidden_BTD, place), target, number)


def programs_of(config: ModelConfig) -> Programs:
  """Returns the programs of a configuration, which are made once for an implementation."""
  form = family(config.family).form
  return _programs_by(config, resolver.resolve(form, config.implementation))


@functools.lru_cache(maxsize=8)
def _programs_by(config: ModelConfig, implementation: str) -> Programs:
  del implementation  # What "auto" means here and now, which the model asks by itself.
  return Programs(config)


def _log_likelihood(logits_KV: Array, target_K: Array) -> tuple[Array, Array]:
  """Returns the targets' log-probabilities, and whether each is the first of the most probable."""
  vocabulary = jnp.arange(logits_KV.shape[-1], dtype=jnp.int32)[None]
  is_target = target_K[:, None] == vocabulary
  # Sums and minima instead of look-ups: the vocabulary may be split over devices.
  target_logit = jnp.sum(jnp.where(is_target, logits_KV, 0.0), axis=-1)
  largest_K1 = jnp.max(logits_KV, axis=-1, keepdims=True)
  first = jnp.min(
      jnp.where(logits_KV == largest_K1, vocabulary, logits_KV.shape[-1]), axis=-1
  )
  log_z = jax.nn.logsumexp(logits_KV, axis=-1)
  return target_logit - log_z, first == target_K


def everywhere(x: np.ndarray, params: Params) -> Array:
  """Puts an array whole on every device of the parameters; all processes must have the same."""
  placed = next(iter(params.values())).sharding
  if not isinstance(placed, NamedSharding):
    return jax.device_put(x, placed)
  whole = NamedSharding(placed.mesh, PartitionSpec())
  return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])
