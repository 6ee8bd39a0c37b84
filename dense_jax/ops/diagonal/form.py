"""`DiagonalForm`: makes the recurrences of layers with diagonal states."""

import dataclasses

import jax.numpy as jnp

from dense_jax.batch import Segments, Token
from dense_jax.ops import sequence_parallel
from dense_jax.ops.diagonal.reference import diagonal_step
from dense_jax.ops.diagonal.sequence import DiagonalSequence
from dense_jax.ops.diagonal.step_sizes import StepSizes
from dense_jax.ops.diagonal.token import DiagonalToken
from dense_jax.ops.recurrence import Recurrence
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class DiagonalForm:
  """The chosen implementation of diagonal states; calling it makes a recurrence.

  Attributes:
    sequence: the class of recurrences over whole sequences.
    chunk: tokens per chunk; 0 means the implementation's default.
  """

  sequence: type[DiagonalSequence]
  chunk: int

  def __call__(
      self, dt: Array | StepSizes, a_NE: Array, x: Array, b: Array, tokens: Segments | Token,
      initial_BNE: Array | None,
  ) -> Recurrence:
    """Makes a recurrence of a sequence or of one token.

    Args:
      dt: step sizes dt_BTE (for one token dt_BE) >= 0, or a `StepSizes` that computes them.
      a_NE: float32 decay rates <= 0.
      x: inputs x_BTE or x_BE.
      b: input maps b_BTN or b_BN.
      tokens: the sequence's documents, or the one token.
      initial_BNE: float32 state before the first token; None means zero, and is not allowed
        for one token.
    """
    if isinstance(tokens, Token):
      assert initial_BNE is not None
      dt_BE = dt.dt() if isinstance(dt, StepSizes) else dt
      return DiagonalToken(diagonal_step(a_NE[None], initial_BNE, dt_BE, x, b))
    resets_BT, valid_BT = tokens.resets_BT, tokens.valid_BT
    if valid_BT is not None:
      if isinstance(dt, StepSizes):
        dt = dataclasses.replace(dt, valid_BT=valid_BT)
      else:
        dt = jnp.where(valid_BT[..., None], dt, 0)
    states = self.sequence(dt, a_NE, x, b, resets_BT, initial_BNE, self.chunk)
    if sequence_parallel.shards() == 1:
      return states
    return dataclasses.replace(states, initial_BNE=_before_shard(states))


def _before_shard(states: DiagonalSequence) -> Array:
  """Computes the state before this device's tokens, h_BNE, from the tokens to the left."""
  first_BNE = states.before_first()
  on_first = dataclasses.replace(
      states, initial_BNE=sequence_parallel.on_first_shard(first_BNE)
  )
  u_BNE = on_first.after_last()
  dt_BE = jnp.sum(states.dt_BTE().astype(jnp.float32), axis=1)
  decay_BNE = jnp.exp(dt_BE[:, None] * states.a_NE[None])
  decay_BNE = sequence_parallel.unless_reset(decay_BNE, states.resets_BT)
  return sequence_parallel.before_shard(
      (decay_BNE, u_BNE), first_BNE, sequence_parallel.elementwise
  )
