"""Gates of dense connections: low-rank maps from a layer's input."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.linear import Linear, xavier_uniform, zeros
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array

T = TypeVar("T")


def bottleneck(config: ModelConfig) -> int:
  """Returns R, the rank of every map that dense connections make from a layer's input."""
  return max(1, config.width // config.dense.gate_reduction)


class Gate(nnx.Module):
  """The gate silu(silu(x W1) W2) of the layer's input (released DenseRetNet).

  Args:
    config: the model.
    width: channels of the gate.
    axis: the logical axis of these channels.
  """

  def __init__(self, config: ModelConfig, width: int, axis: str | None, rngs: nnx.Rngs) -> None:
    rank = bottleneck(config)
    # With W2 zero the gate starts at zero, yet it learns, because silu has slope 1/2 there.
    last = zeros if config.dense.gate_init == "zeros" else xavier_uniform(2**-2.5)
    self.down = Linear(
        config.width, rank, axes=("embed", None), init=xavier_uniform(2**-2.5), rngs=rngs
    )
    self.up = Linear(rank, width, axes=(None, axis), init=last, rngs=rngs)

  def __call__(self, x_D: Array) -> Array:
    """Maps [..., D] to [..., width]."""
    return self.low_rank(x_D).value()

  def low_rank(self, x_D: Array) -> LowRankGate:
    """Returns the gate of [..., D] before its last map, which a kernel can compute."""
    return LowRankGate(jax.nn.silu(self.down(x_D)), self.up.kernel[...], self.up.matmul)


def make_gates(
    config: ModelConfig, sources: int, width: int, axis: str | None, rngs: nnx.Rngs
) -> nnx.List:
  """Makes one gate for all sources, or one for each, nearest first."""
  count = 1 if config.dense.gate_sharing == "shared" else sources
  return nnx.List([Gate(config, width, axis, rngs) for _ in range(count)])


def low_rank_gates(
    gates: Mapping[str, Sequence[Gate]], x_D: Array, *, joined: bool
) -> dict[str, list[LowRankGate]]:
  """Returns several lists of gates of one input, before their last maps.

  Args:
    gates: name -> gates.
    x_D: the input.
    joined: whether the first maps of a sequence are one product, which reads the input and adds to
      its gradient once. One token of decoding is smaller than the matrices that would be joined.
  """
  if not joined or x_D.ndim < 3:
    return {name: [gate.low_rank(x_D) for gate in of_name] for name, of_name in gates.items()}
  down = [gate.down for of_name in gates.values() for gate in of_name]
  kernel = jnp.concatenate([linear.kernel[...] for linear in down], axis=1)
  hidden = iter(jnp.split(jax.nn.silu(down[0].matmul(x_D, kernel)), len(down), axis=-1))
  return {
      name: [
          LowRankGate(next(hidden), gate.up.kernel[...], gate.up.matmul) for gate in of_name
      ]
      for name, of_name in gates.items()
  }


def of_source(gates: Sequence[T], source: int) -> T:
  """Returns the gate of a source (0 is the nearest); a single gate serves all sources."""
  return gates[source if len(gates) > 1 else 0]
