"""`MatrixForm`: makes the recurrences of layers with matrix states."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from dense_jax.batch import Segments, Token
from dense_jax.ops import sequence_parallel
from dense_jax.ops.matrix.chunked import chunk_states
from dense_jax.ops.matrix.sequence import MatrixSequence
from dense_jax.ops.matrix.token import MatrixToken
from dense_jax.ops.recurrence import Recurrence
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class MatrixForm:
  """The chosen implementation of matrix states; calling it makes a recurrence.

  Attributes:
    sequence: the class of recurrences over whole sequences.
    step: `matrix_step`, or an equivalent for the platform.
    chunk: tokens per chunk; 0 means the implementation's default.
    equal_decays: true if every layer of the model has the same decays.
  """

  sequence: type[MatrixSequence]
  step: Callable[[Array, Array, Array, Array], Array]
  chunk: int
  equal_decays: bool

  def __call__(
      self, k: Array, v: Array, scale: Array | None, log_decay: Array, tokens: Segments | Token,
      initial_BHPN: Array | None,
  ) -> Recurrence:
    """Makes a recurrence of a sequence or of one token.

    Args:
      k: keys k_BTJN (for one token k_BJN); head h uses those of group h // (H / J).
      v: values v_BTE or v_BTHP (for one token v_BE or v_BHP), in the keys' dtype.
      scale: float32 factor of the values, scale_BTH or scale_BH; None means 1.
      log_decay: float32, <= 0, log_decay_BTH or log_decay_BH; its B may be 1 (a decay that all
        rows share).
      tokens: the sequence's documents, or the one token.
      initial_BHPN: float32 state before the first token; None means zero, and is not allowed
        for one token.
    """
    if isinstance(tokens, Token):
      assert initial_BHPN is not None
      v = v.reshape(len(v), log_decay.shape[-1], -1)
      if scale is not None:
        v = (scale[..., None] * v).astype(v.dtype)
      return MatrixToken(self.step(initial_BHPN, log_decay, k, v))
    if v.ndim == 4:
      v = v.reshape(*v.shape[:2], -1)
    resets_BT, valid_BT = tokens.resets_BT, tokens.valid_BT
    if valid_BT is not None:
      log_decay = jnp.where(valid_BT[..., None], log_decay, 0)
      k = jnp.where(valid_BT[..., None, None], k, 0)
    states = self.sequence(
        k, v, scale, log_decay, resets_BT, initial_BHPN, self.chunk, self.equal_decays
    )
    if sequence_parallel.shards() == 1:
      return states
    return dataclasses.replace(states, initial_BHPN=_before_shard(states))


def _before_shard(states: MatrixSequence) -> Array:
  """Computes the state before this device's tokens, h_BHPN, from the tokens to the left."""
  first_BHPN = states.before_first()
  _, u_BHPN = chunk_states(
      states.k_BTJN, states.scaled_BTHP(), states.log_decay_BTH, states.resets_BT,
      sequence_parallel.on_first_shard(first_BHPN), associative=False, chunk=states.chunk,
  )
  decay_BH = jnp.exp(jnp.sum(states.log_decay_BTH, axis=1))
  decay_BH11 = jnp.broadcast_to(decay_BH, u_BHPN.shape[:2])[..., None, None]
  decay_BH11 = sequence_parallel.unless_reset(decay_BH11, states.resets_BT)
  return sequence_parallel.before_shard(
      (decay_BH11, u_BHPN), first_BHPN, sequence_parallel.elementwise
  )
