"""`LtiForm`: makes the recurrences of layers with time-invariant systems."""

import dataclasses

import jax.numpy as jnp

from dense_jax.batch import Segments, Token
from dense_jax.ops import sequence_parallel
from dense_jax.ops.lti.chunked import lti_chunk_states
from dense_jax.ops.lti.sequence import LtiSequence
from dense_jax.ops.lti.system import System
from dense_jax.ops.lti.token import LtiToken
from dense_jax.ops.recurrence import Recurrence
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class LtiForm:
  """The chosen implementation of time-invariant systems; calling it makes a recurrence.

  Attributes:
    sequence: the class of recurrences over whole sequences.
    chunk: tokens per chunk; 0 means the implementation's default.
  """

  sequence: type[LtiSequence]
  chunk: int

  def __call__(
      self, system: System, x: Array, tokens: Segments | Token, initial_BNE: Array | None
  ) -> Recurrence:
    """Makes a recurrence of a sequence or of one token.

    Args:
      system: the discretised systems, one per channel.
      x: inputs x_BTE or x_BE.
      tokens: the sequence's documents, or the one token.
      initial_BNE: float32 state before the first token; None means zero, and is not allowed
        for one token.
    """
    if isinstance(tokens, Token):
      assert initial_BNE is not None
      return LtiToken(system.stepper()(initial_BNE, x))
    states = self.sequence(
        system, x, tokens.resets_BT, tokens.valid_BT, initial_BNE, self.chunk
    )
    if sequence_parallel.shards() == 1:
      return states
    return dataclasses.replace(states, initial_BNE=_before_shard(states))


def _before_shard(states: LtiSequence) -> Array:
  """Computes the state before this device's tokens, h_BNE, from the tokens to the left.

  A is a power of the system's matrix on all devices, so that only whether the state is cleared is
  exchanged in its place. Padding counts as tokens: no tokens follow it, and its reads are unused.
  """
  batch, time, _ = states.x_BTE.shape
  first_BNE = states.before_first()
  _, u_BNE = lti_chunk_states(
      states.system, states.x_BTE, states.resets_BT, None,
      sequence_parallel.on_first_shard(first_BNE), chunk=states.chunk,
  )
  kept_B = sequence_parallel.unless_reset(jnp.ones(batch, jnp.float32), states.resets_BT)

  def join(
      left: tuple[Array, Array], right: tuple[Array, Array], devices: int
  ) -> tuple[Array, Array]:
    carried_BNE = states.system.advance(time * devices)(left[1])
    return left[0] * right[0], right[0][:, None, None] * carried_BNE + right[1]

  return sequence_parallel.before_shard((kept_B, u_BNE), first_BNE, join)
