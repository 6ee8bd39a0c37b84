"""The cost of a Pallas kernel as its author states it, in a form that compiled programs keep.

`pl.CostEstimate` does not tell matmuls from other arithmetic, and the compilers for GPUs drop it.
A scope around the call ends up in the name of the operation, on every platform, where
`dense_jax/costs` reads it.
"""

import contextlib
import dataclasses

import jax
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class KernelCost:
  """The cost of one call of a kernel on one device.

  Attributes:
    matmul_flops: operations in matmuls, 2 M N K each.
    flops: all other arithmetic.
    transcendentals: evaluations of exp, log, tanh, rsqrt and the like.
    bytes_accessed: bytes read from and written to main memory. What other programs of the grid
      read again counts once, as if it stayed in the cache.
  """

  matmul_flops: int
  flops: int
  transcendentals: int
  bytes_accessed: int

  def estimate(self) -> pl.CostEstimate:
    """Returns the argument `cost_estimate` of `pl.pallas_call`."""
    return pl.CostEstimate(
        flops=self.matmul_flops + self.flops, transcendentals=self.transcendentals,
        bytes_accessed=self.bytes_accessed,
    )

  def scope(self) -> contextlib.AbstractContextManager[None]:
    """Returns the scope in which to call the kernel."""
    return jax.named_scope(
        f"kernel_cost[matmul_flops={self.matmul_flops},flops={self.matmul_flops + self.flops},"
        f"transcendentals={self.transcendentals},bytes_accessed={self.bytes_accessed}]"
    )
