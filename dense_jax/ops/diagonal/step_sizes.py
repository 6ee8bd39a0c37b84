"""Step sizes of the selective recurrence in low-rank form."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dense_jax.ops.cpu import spread
from dense_jax.ops.matmul import matmul
from dense_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepSizes:
  """Step sizes dt = softplus(low W + bias), stored as `low`: R numbers per token instead of E.

  Attributes:
    low_BTR: the input of the low-rank map, in the model's dtype; in decoding low_BR.
    kernel_RE: float32 map W.
    bias_E: float32 bias.
    valid_BT: bool, false where dt is zero (padding); None means all true.
    matmul: `matmul`, or an equivalent for the platform.
  """

  low_BTR: Array
  kernel_RE: Array
  bias_E: Array
  valid_BT: Array | None = None
  matmul: Callable[[Array, Array], Array] = dataclasses.field(
      default=matmul, metadata={"static": True}
  )

  def before_softplus(self) -> Array:
    """Computes low W, [B, T, E] (in decoding [B, E]), in the dtype of `low`; without the bias."""
    return self.matmul(self.low_BTR, self.kernel_RE)

  def dt(self) -> Array:
    """Computes dt_BTE (in decoding dt_BE), float32."""
    dt = self.before_softplus().astype(jnp.float32)
    dt = jax.nn.softplus(dt + spread(self.bias_E, dt))
    return dt if self.valid_BT is None else jnp.where(self.valid_BT[..., None], dt, 0)
