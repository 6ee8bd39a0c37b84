"""How a layer makes recurrences of time-invariant systems."""

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
    sequence: its class for whole sequences.
    chunk: tokens a chunk; 0 takes the implementation's own.
  """

  sequence: type[LtiSequence]
  chunk: int

  def __call__(
      self, system: System, x: Array, tokens: Segments | Token, initial_BNE: Array | None
  ) -> Recurrence:
    """Makes a recurrence of a sequence or of one token.

    Args:
      system: the discretised systems.
      x: inputs x_BTE or x_BE.
      tokens: the sequence's documents, or the one token.
      initial_BNE: float32 state before the first token; None means zero (of a sequence).
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
  """The state before this device's tokens, h_BNE, from those of all devices to the left.

  All devices have the same A, a power of the system's matrix: (cleared or not, u) is exchanged.
  Padding counts as tokens: behind it there are none, and what is read there means nothing.
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
