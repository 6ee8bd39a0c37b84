"""The inputs of selective kernels, for TPUs and GPUs alike, and the sizes they are padded to."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import pad_time
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matmul import matmul
from dense_jax.types import Array

# The least size of a factor's axis in a matrix unit, at any dtype.
LEAST = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """The product hidden up, [B, T, E], which kernels compute, so that only R numbers a token move.

  Attributes:
    hidden_BTR: float32 or bfloat16; the product is rounded to this dtype.
    up_RE: float32.
  """

  hidden_BTR: Array
  up_RE: Array

  @property
  def dtype(self) -> jnp.dtype:
    """The product's dtype."""
    return self.hidden_BTR.dtype

  @property
  def rank(self) -> int:
    """R."""
    return self.up_RE.shape[0]

  def rounded(self) -> "LowRank":
    """Returns it with both factors in one dtype, as a kernel multiplies them."""
    return LowRank(self.hidden_BTR, self.up_RE.astype(self.dtype))

  def gradient(self, d_BTE: Array) -> "LowRank":
    """Returns the gradient of both factors, given that of the product."""
    return LowRank(*jax.vjp(matmul, self.hidden_BTR, self.up_RE)[1](d_BTE))


Wide = Array | LowRank
"""E numbers a token: an array [B, T, E], or a product that kernels compute."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """One selective recurrence, with the query of its read.

  Attributes:
    dt: step sizes dt_BTE >= 0, or with `bias_E` what softplus(dt + bias) makes step sizes of; an
      array, float32 or bfloat16, or with `bias_E` also a product.
    bias_E: float32; None means that `dt` are step sizes.
    a_NE: float32 decay rates <= 0.
    x_BTE: inputs, float32 or bfloat16.
    b_BTN: input maps, float32 or bfloat16.
    c_BTN: queries, float32 or bfloat16.
    initial_BNE: float32 state before the first token.
    gate: the index of the read's gate, which sources may share; None means 1.
  """

  dt: Wide
  bias_E: Array | None
  a_NE: Array
  x_BTE: Array
  b_BTN: Array
  c_BTN: Array
  initial_BNE: Array
  gate: int | None = dataclasses.field(default=None, metadata={"static": True})

  def check(self, other: "Source") -> None:
    """Checks that shapes fit each other, and those of another source."""
    (batch, time, width), state_size = other.x_BTE.shape, len(other.a_NE)
    _check_wide(self.dt, batch, time, width)
    if self.bias_E is None:
      assert not isinstance(self.dt, LowRank), "expected a bias with a product"
    else:
      chex.assert_shape(self.bias_E, (width,))
    chex.assert_shape(self.x_BTE, (batch, time, width))
    chex.assert_shape([self.b_BTN, self.c_BTN], (batch, time, state_size))
    chex.assert_shape(self.a_NE, (state_size, width))
    chex.assert_shape(self.initial_BNE, (batch, state_size, width))
    chex.assert_type([self.a_NE, self.initial_BNE], jnp.float32)


def _check_wide(x: Wide, batch: int, time: int, width: int) -> None:
  """Checks the shape of E numbers a token."""
  if isinstance(x, LowRank):
    chex.assert_shape(x.hidden_BTR, (batch, time, x.rank))
    chex.assert_shape(x.up_RE, (x.rank, width))
  else:
    chex.assert_shape(x, (batch, time, width))


def check_inputs(
    sources: Sequence[Source], gates: Sequence[Wide], epilogue: Epilogue, *masks_BT: Array | None
) -> None:
  """Checks that the shapes of what kernels take fit each other."""
  batch, time, width = sources[0].x_BTE.shape
  for source in sources:
    source.check(sources[0])
  for gate in gates:
    _check_wide(gate, batch, time, width)
  for mask_BT in masks_BT:
    if mask_BT is not None:
      chex.assert_shape(mask_BT, (batch, time))
  assert not epilogue.moments, "expected no moments of diagonal states"
  epilogue.check(batch, time, width, width)


class SelectiveFinish(Protocol):
  """The epilogue of the sum of gated reads of selective recurrences, by a platform's kernels."""

  def __call__(
      self,
      sources: Sequence[Source],
      gates: Sequence[Wide],
      epilogue: Epilogue,
      resets_BT: Array | None,
      valid_BT: Array | None,
      *,
      chunk: int = 0,
      interpret: bool = False,
  ) -> tuple[Array, Array]:
    """Computes it; differentiable in every array of the sources, the gates and the epilogue.

    Each gradient has its input's dtype. Sums are float32; on a GPU, the shares that blocks of
    channels have in the gradients of B and C are rounded to these inputs' dtype before they are
    added.

    Args:
      sources: the recurrences, at least one, all with the same B, T, E and N.
      gates: the gates of their reads, each used by at least one: an array is multiplied as it is,
        and of a product, silu(product) is.
      epilogue: what follows, without moments; if it has `skip` and no x, x is that of the first
        source.
      resets_BT: bool, true where all states are cleared before the token; None means never.
      valid_BT: bool, false where step sizes made in the kernel are zero; None means all true.
      chunk: tokens between the states that are kept for the backward pass, rounded up to a
        multiple of 16; 0 means the platform's default.
      interpret: true to run the kernels on any platform, for tests.

    Returns:
      The result [B, T, E] in the epilogue's dtype, and final_BNE, the first source's state after
      the last token, float32.
    """


@dataclasses.dataclass(frozen=True)
class Padding:
  """Zeros at the end of axes: up to a multiple of `chunk` tokens, `channels` and `states` more.

  The ranks of products are padded to powers of two.
  """

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

  def wide(self, x: Wide) -> Wide:
    """Pads E numbers a token."""
    if not isinstance(x, LowRank):
      return self._tokens(x)
    extra = max(LEAST, 1 << (x.rank - 1).bit_length()) - x.rank
    up_RE = jnp.pad(x.up_RE, ((0, extra), (0, self.channels)))
    return LowRank(pad_time(self._last(x.hidden_BTR, extra), self.chunk), up_RE)

  def source(self, source: Source) -> Source:
    """Pads a recurrence."""
    return Source(
        self.wide(source.dt), self._channels(source.bias_E), self._states(source.a_NE),
        self._tokens(source.x_BTE), self._maps(source.b_BTN), self._maps(source.c_BTN),
        self._states(source.initial_BNE), source.gate,
    )

  def epilogue(self, epilogue: Epilogue) -> Epilogue:
    """Pads an epilogue."""
    return dataclasses.replace(
        epilogue, skip=self._channels(epilogue.skip), x=self._tokens(epilogue.x),
        z=self._tokens(epilogue.z),
    )


def rounded(x: Wide) -> Wide:
  """Returns E numbers a token as kernels take them: the factors of a product in one dtype."""
  return x.rounded() if isinstance(x, LowRank) else x


def gradient(x: Wide, d_BTE: Array) -> Wide:
  """Returns the gradient of E numbers a token, given that of the array that they make."""
  return x.gradient(d_BTE) if isinstance(x, LowRank) else d_BTE


def products(sources: Sequence[Source], gates: Sequence[Wide]) -> list[LowRank]:
  """Returns the products that a kernel computes."""
  wides = [*(source.dt for source in sources), *gates]
  return [wide for wide in wides if isinstance(wide, LowRank)]


def matmul_flops(sources: Sequence[Source], gates: Sequence[Wide]) -> int:
  """Returns the operations of all products, once each."""
  tokens = sources[0].x_BTE.size
  return sum(2 * tokens * product.rank for product in products(sources, gates))
