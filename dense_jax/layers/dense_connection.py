"""Dense hidden connections: what a layer does with the layers below it.

A mixer hands over what it has (its own inputs, its own read and query) and gets back the
fused form; it knows nothing of fusion, and this file knows nothing of families. The same
code serves a sequence, [B, T, ...], and one token of decoding, [B, ...].
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.linear import Linear, RMSNorm, parameter, xavier_uniform, zeros
from dense_jax.ops.states import StateSequence
from dense_jax.types import Array

Shared = StateSequence | Mapping[str, Array]
"""What a layer leaves for deeper ones: its states, or its recurrence's own inputs."""


def _add(own: Array, reads: Sequence[Array]) -> Array:
  return sum(reads, start=own)


# Hidden fusion: (own read, gated reads of the sources, nearest first) -> y.
FUSIONS: Mapping[str, Callable[[Array, Sequence[Array]], Array]] = {"add": _add}


class Gate(nnx.Module):
  """The selective transition's gate, silu(silu(x W1) W2) (released DenseRetNet)."""

  def __init__(self, config: ModelConfig, width: int, axis: str | None, rngs: nnx.Rngs) -> None:
    rank = max(1, config.width // config.dense.gate_reduction)
    # Started at zero the gate is zero, yet it learns: silu has slope 1/2 there.
    last = zeros if config.dense.gate_init == "zeros" else xavier_uniform(2**-2.5)
    self.down = Linear(
        config.width, rank, axes=("embed", None), init=xavier_uniform(2**-2.5), rngs=rngs
    )
    self.up = Linear(rank, width, axes=(None, axis), init=last, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """[..., D] -> [..., width]."""
    return jax.nn.silu(self.up(jax.nn.silu(self.down(x))))


class DenseConnection(nnx.Module):
  """Joins a layer with its `sources` shallower layers; the identity where there are none.

  Args:
    config: the model.
    sources: S, the layers that are read; fewer than m next to the input.
    inputs: name -> (width, logical axis) of the recurrence's inputs, for injection
      "inputs".
    query: trailing shape of the mixer's query, (N,) or (H, N).
    channels: E, the width of a read.
  """

  def __init__(
      self,
      config: ModelConfig,
      *,
      sources: int,
      inputs: Mapping[str, tuple[int, str | None]],
      query: tuple[int, ...],
      channels: int,
      rngs: nnx.Rngs,
  ) -> None:
    self.inject = config.dense.inject if sources else ""
    self.fuse = FUSIONS[config.dense.fusion]
    self.remat_reads = config.remat == "full"
    if self.inject == "inputs":
      self.gates = nnx.Dict({
          name: Gate(config, width, axis, rngs) for name, (width, axis) in inputs.items()
      })
      self.norms = nnx.Dict({
          name: RMSNorm(width, axis=axis, epsilon=config.norm_eps, rngs=rngs)
          for name, (width, axis) in inputs.items()
          if config.dense.input_norm
      })
    elif self.inject == "state":
      self.gate = Gate(config, channels, "inner", rngs)
      self.linear = config.dense.transition == "linear"
      if self.linear:
        self.transition = parameter(
            rngs, (sources, *query, query[-1]),
            (None, "heads", None, None) if len(query) == 2 else (None, None, None),
            lambda _, shape: jnp.broadcast_to(jnp.eye(shape[-1], dtype=jnp.float32), shape),
        )

  def fuse_inputs(
      self, x: Array, inputs: dict[str, Array], shallow: Sequence[Shared]
  ) -> dict[str, Array]:
    """Equation (5): each input k becomes RMSNorm(k + sum_i gate_k(x) * k_i).

    Args:
      x: the layer's input after its norm, [..., D].
      inputs: the layer's own inputs of the recurrence, [..., width] each.
      shallow: the sources' own inputs, before their fusion; nearest first.
    """
    if self.inject != "inputs":
      return inputs
    fused = {}
    for name, own in inputs.items():
      gate = self.gates[name](x)
      sources = [cast(Mapping[str, Array], source)[name] for source in shallow]
      total = own + gate * functools.reduce(operator.add, sources)
      fused[name] = self.norms[name](total) if name in self.norms else total
    return fused

  def fuse_reads(
      self, x: Array, own: Array, query: Array, shallow: Sequence[Shared]
  ) -> Array:
    """Equations (3) and (4): joins the own read with lazy reads of the sources' states.

    phi(h) = gate(x) * (W h) is linear in h, so that reading it is reading the source's
    own recurrence with the query W^T C, times the gate.

    Args:
      x: the layer's input after its norm, [..., D].
      own: the read of the layer's own states, [..., E] or [..., H, P], float32.
      query: the query that made it, [..., N] or [..., H, N].
      shallow: the sources' states, nearest first.
    """
    if self.inject != "state":
      return own
    gate = self.gate(x).astype(jnp.float32).reshape(own.shape)
    reads = []
    for index, source in enumerate(shallow):
      source_query = query
      if self.linear:
        matrix = self.transition[...][index].astype(query.dtype)
        rule = "...hn,hnm->...hm" if matrix.ndim == 3 else "...n,nm->...m"
        source_query = jnp.einsum(rule, query, matrix)
      read = jax.checkpoint(_read) if self.remat_reads else _read
      reads.append(gate * read(cast(StateSequence, source), source_query))
    return self.fuse(own, reads)


def _read(source: StateSequence, query: Array) -> Array:
  return source.read(query)
