"""Continues prompts: one parallel prefill, then a compiled scan of single steps."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.batch import Segments
from dense_jax.errors import InputError
from dense_jax.generation.sampling import Sampling, sample
from dense_jax.models.language_model import LanguageModel, ModelState
from dense_jax.models.params import get_params, unrolled, with_params
from dense_jax.types import Array, Params

# Tokens of one compiled scan. Between scans, the host sees the tokens and may stop.
_BLOCK = 64


def pad_prompts(prompts: Sequence[Sequence[int]], multiple: int) -> tuple[np.ndarray, Segments]:
  """Pads prompts on the right to one length, a multiple of `multiple`.

  Returns:
    tokens_BT, int32, and segments in which each prompt is a document and the rest is padding.
  """
  length = max(len(prompt) for prompt in prompts)
  length += -length % multiple
  tokens_BT = np.zeros((len(prompts), length), np.int32)
  ids_BT = np.zeros_like(tokens_BT)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, : len(prompt)] = prompt
    ids_BT[row, : len(prompt)] = 1
  positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape)
  return tokens_BT, Segments(jnp.asarray(positions_BT), jnp.asarray(ids_BT))


class Generator:
  """Samples continuations of prompts; time and memory per token do not grow with their number."""

  def __init__(self, model: LanguageModel, sampling: Sampling) -> None:
    """Unrolls the layers, once; the programs are compiled on first use."""
    model = unrolled(model)
    self._params = get_params(model)

    def prefill(params: Params, tokens_BT: Array, segments: Segments) -> tuple[ModelState, Array]:
      return with_params(model, params).prefill(tokens_BT, segments)

    def decode(
        params: Params, state: ModelState, logits_BV: Array, key: Array
    ) -> tuple[ModelState, Array, Array]:
      bound = with_params(model, params)

      def body(
          carry: tuple[ModelState, Array], key: Array
      ) -> tuple[tuple[ModelState, Array], Array]:
        state, logits_BV = carry
        tokens_B = sample(logits_BV, key, sampling)
        return bound.step(state, tokens_B), tokens_B

      keys = jax.random.split(key, _BLOCK)
      (state, logits_BV), tokens_TB = jax.lax.scan(body, (state, logits_BV), keys)
      return state, logits_BV, tokens_TB.T

    self._prefill = jax.jit(prefill)
    self._decode = jax.jit(decode, donate_argnums=(1, 2))

  def stream(self, prompts: Sequence[Sequence[int]], *, seed: int) -> Iterator[np.ndarray]:
    """Yields blocks of new tokens, int32 [B, 64], without end; equal seeds give equal tokens.

    Raises:
      InputError: a prompt has no token.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
      raise InputError("prompt = [] is not valid: expected at least one token")
    tokens_BT, segments = pad_prompts(prompts, _BLOCK)
    state, logits_BV = self._prefill(self._params, jnp.asarray(tokens_BT), segments)
    key = jax.random.key(seed)
    while True:
      key, block_key = jax.random.split(key)
      state, logits_BV, tokens_BT = self._decode(self._params, state, logits_BV, block_key)
      yield np.asarray(tokens_BT)

  def __call__(
      self,
      prompts: Sequence[Sequence[int]],
      *,
      max_new_tokens: int,
      seed: int = 0,
      stop_id: int | None = None,
  ) -> list[list[int]]:
    """Continues each prompt by at most `max_new_tokens` tokens.

    Returns:
      The new tokens of each prompt, up to but without the first `stop_id`.

    Raises:
      InputError: a prompt has no token.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(rows)
    for block in self.stream(prompts, seed=seed):
      for index, row in enumerate(rows):
        for token in block[index].tolist():
          done[index] = done[index] or token == stop_id or len(row) >= max_new_tokens
          if not done[index]:
            row.append(token)
        done[index] = done[index] or len(row) >= max_new_tokens
      if all(done):
        return rows
    raise AssertionError("stream is endless")
