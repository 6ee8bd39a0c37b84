"""The inputs of selective kernels, for TPUs and GPUs alike, and the sizes they are padded to."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import pad_time
from dense_jax.ops.epilogue import Epilogue
from dense_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """One selective recurrence, with the query and gate of its read.

  Attributes:
    dt_BTE: step sizes >= 0, or with `bias_E` what softplus(dt + bias) makes step sizes of; float32
      or bfloat16.
    bias_E: float32; None means that `dt_BTE` are step sizes.
    a_NE: float32 decay rates <= 0.
    x_BTE: inputs, float32 or bfloat16.
    b_BTN: input maps, float32 or bfloat16.
    c_BTN: queries, float32 or bfloat16.
    gate_BTE: factors of the read, float32 or bfloat16; None means 1.
    initial_BNE: float32 state before the first token.
  """

  dt_BTE: Array
  bias_E: Array | None
  a_NE: Array
  x_BTE: Array
  b_BTN: Array
  c_BTN: Array
  gate_BTE: Array | None
  initial_BNE: Array

  def check(self, other: "Source") -> None:
    """Checks that shapes fit each other, and x of another source."""
    batch, time, width = other.x_BTE.shape
    state_size = self.a_NE.shape[0]
    gates = [] if self.gate_BTE is None else [self.gate_BTE]
    chex.assert_shape([self.dt_BTE, self.x_BTE, *gates], (batch, time, width))
    chex.assert_shape([self.b_BTN, self.c_BTN], (batch, time, state_size))
    chex.assert_shape(self.a_NE, (state_size, width))
    chex.assert_shape(self.initial_BNE, (batch, state_size, width))
    chex.assert_type([self.a_NE, self.initial_BNE], jnp.float32)


@dataclasses.dataclass(frozen=True)
class Padding:
  """Zeros at the end of axes: up to a multiple of `chunk` tokens, `channels` and `states` more."""

  chunk: int
  channels: int
  states: int = 0

  def _last(self, x: Array, extra: int) -> Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, extra),)) if extra else x

  def _channels(self, x_E: Array | None) -> Array | None:
    return None if x_E is None else self._last(x_E, self.channels)

  def _tokens(self, x_BTE: Array | None) -> Any:
    return None if x_BTE is None else pad_time(self._last(x_BTE, self.channels), self.chunk)

  def _maps(self, x_BTN: Array) -> Array:
    return pad_time(self._last(x_BTN, self.states), self.chunk)

  def _states(self, x_NE: Array) -> Array:
    rows = ((0, 0),) * (x_NE.ndim - 2) + ((0, self.states), (0, self.channels))
    return jnp.pad(x_NE, rows) if self.states or self.channels else x_NE

  def source(self, source: Source) -> Source:
    """Pads a recurrence."""
    return Source(
        self._tokens(source.dt_BTE), self._channels(source.bias_E), self._states(source.a_NE),
        self._tokens(source.x_BTE), self._maps(source.b_BTN), self._maps(source.c_BTN),
        self._tokens(source.gate_BTE), self._states(source.initial_BNE),
    )

  def epilogue(self, epilogue: Epilogue) -> Epilogue:
    """Pads an epilogue."""
    return dataclasses.replace(
        epilogue, skip=self._channels(epilogue.skip), x=self._tokens(epilogue.x),
        z=self._tokens(epilogue.z),
    )
