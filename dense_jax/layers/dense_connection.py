"""Dense hidden connections: what a layer does with the layers below it.

A mixer hands over what it has (its own inputs, its own read and query) and gets back the
fused form; it knows nothing of fusion, and this file knows nothing of families. The same
code serves a sequence, [B, T, ...], and one token of decoding, [B, ...].
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self, cast

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig, invalid
from dense_jax.layers.fusion import FUSIONS
from dense_jax.layers.linear import RMSNorm
from dense_jax.layers.transition import Phi, Reads, Transition, make_gates, of_source
from dense_jax.ops.state_sequence import GatedRead, Mapped, ReadApart, StateSequence, TokenState
from dense_jax.types import Array

Shared = StateSequence | Mapping[str, Array] | None
"""What a layer leaves for deeper ones: its states, or its recurrence's inputs."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusedStates(ReadApart):
  """h + phi(h of the layer below), read lazily: one read for each layer of the chain."""

  own: StateSequence
  below: StateSequence
  phi: Phi

  def final(self) -> Array:
    """The own state after the last token: what is fused is read, never carried."""
    return self.own.final()

  def shared(self) -> Self:
    """See `StateSequence`."""
    return self

  def materialize(self) -> Array:
    """See `StateSequence`."""
    project = jax.vmap(self.phi.project, in_axes=1, out_axes=1)
    below = project(self.below.materialize(), self.phi.state_gate)
    return self.own.materialize() + self.phi.gated(below)

  def read(self, query: Array) -> Array:
    """See `StateSequence`."""
    return self.own.read(query) + self.phi.gated(self.phi.read(self.below, query))

  def read_mapped(self, query: Array, function: Mapped, inputs: Array | None) -> Array:
    """See `StateSequence`; `function` must be linear in the states."""

    def both(h: Array, inputs_both: tuple[Array | None, Array | None]) -> Array:
      return function(self.phi.project(h, inputs_both[1]), inputs_both[0])

    below = self.below.read_mapped(query, both, (inputs, self.phi.state_gate))
    return self.own.read_mapped(query, function, inputs) + self.phi.gated(below)


class DenseConnection(nnx.Module):
  """Joins a layer with its `sources` shallower layers; the identity where there are none.

  Args:
    config: the model.
    sources: S, the layers that are read; fewer than m next to the input.
    inputs: name -> (width, logical axis) of the recurrence's inputs, for injection
      "inputs"; empty where a family has none that depend on the token.
    query: trailing shape of the mixer's query, (N,) or (J, N).
    channels: E, the width of a read.
    fixed_query: the query is a parameter [E, N], not a function of the token.

  Raises:
    InputError: injection "inputs", and no inputs.
  """

  def __init__(
      self,
      config: ModelConfig,
      *,
      sources: int,
      inputs: Mapping[str, tuple[int, str | None]],
      query: tuple[int, ...],
      channels: int,
      fixed_query: bool = False,
      rngs: nnx.Rngs,
  ) -> None:
    dense = config.dense
    self.inject = dense.inject if sources else ""
    self.share_fused = dense.source == "fused"
    self.remat_reads = config.remat in ("reads", "full")
    if self.inject == "inputs":
      if not inputs:
        raise invalid(
            "config.model.dense.inject", dense.inject,
            f"state with family={config.family}, whose state has no inputs made by the token",
        )
      if dense.gate != "none":
        self.gates = nnx.Dict({
            name: make_gates(config, sources, width, axis, rngs)
            for name, (width, axis) in inputs.items()
        })
      self.norms = nnx.Dict({
          name: RMSNorm(width, axis=axis, epsilon=config.norm_eps, rngs=rngs)
          for name, (width, axis) in inputs.items()
          if dense.input_norm
      })
    elif self.inject == "state":
      reads = Reads(sources, query, channels, fixed_query)
      self.transition = Transition(config, reads, rngs)
      self.fusion = FUSIONS[dense.fusion](config, reads, rngs)

  def fuse_inputs(
      self, x: Array, inputs: dict[str, Array], shallow: Sequence[Shared]
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Equation (5): each input k becomes RMSNorm(k + sum_i gate_k(x) * k_i).

    Args:
      x: the layer's input after its norm, [..., D].
      inputs: the layer's own inputs of the recurrence, [..., width] each.
      shallow: what the sources shared, nearest first.

    Returns:
      The fused inputs, and those that this layer shares: its own or the fused ones.
    """
    if self.inject != "inputs":
      return inputs, inputs
    fused = {}
    for name, own in inputs.items():
      total = own
      for index, source in enumerate(shallow):
        read = cast(Mapping[str, Array], source)[name]
        gated = hasattr(self, "gates")
        total = total + (of_source(self.gates[name], index)(x) * read if gated else read)
      fused[name] = self.norms[name](total) if name in self.norms else total
    return fused, fused if self.share_fused else inputs

  def read(
      self, x: Array, query: Array, states: StateSequence, shallow: Sequence[Shared]
  ) -> tuple[Array, StateSequence, StateSequence]:
    """Equations (3) and (4): the own read, joined with lazy reads of the sources' states.

    Args:
      x: the layer's input after its norm, [..., D].
      query: the mixer's query, [..., N] or [..., J, N], or [E, N] if it is fixed.
      states: the layer's own states.
      shallow: what the sources shared, nearest first.

    Returns:
      The fused read, [..., E] or [..., H, P] in float32; the own states as reading left
      them; and the states that this layer shares: its own or the fused ones.
    """
    if self.inject != "state":
      y, states = states.read_with(query)
      return y, states, states.shared()
    sources = [cast(StateSequence, source) for source in shallow]
    phis = [self.transition.phi(x, index) for index in range(len(sources))]
    queries = [self.fusion.query(query, index) for index in range(1 + len(sources))]
    joint = states.joint and self.fusion.is_sum and not self.share_fused
    if joint and all(phi.is_query for phi in phis):
      y, states = states.read_with(queries[0], [
          GatedRead(source, phi.query(source_query), phi.channel_gate)
          for source, phi, source_query in zip(sources, phis, queries[1:], strict=True)
      ])
      return y, states, states.shared()
    own, states = states.read_with(queries[0])
    own, *reads = self._reads(own, phis, queries[1:], sources, x.dtype)
    fused = self.fusion(x, own, reads)
    if not self.share_fused:
      return fused, states, states.shared()
    if isinstance(states, TokenState):  # One token's states are there: no chain is needed.
      below = phis[0].project(sources[0].materialize(), phis[0].state_gate)
      return fused, states, states.plus(phis[0].gated(below))
    return fused, states, FusedStates(states.shared(), sources[0], phis[0])

  def _reads(
      self, own: Array, phis: Sequence[Phi], queries: Sequence[Array],
      sources: Sequence[StateSequence], dtype: jnp.dtype,
  ) -> list[Array]:
    """The own read, and the sources' gated reads, float32; rounded before the gate."""

    def read(phi: Phi, query: Array, source: StateSequence) -> Array:
      return phi.read(source, query).astype(dtype)

    reads = [own]
    for phi, query, source in zip(phis, queries, sources, strict=True):
      if not self.remat_reads:
        reads.append(phi.gated(read(phi, query, source)))
        continue
      # One after the other in the backward pass too: so that no two reads' intermediate values
      # exist together.
      source, reads[-1] = jax.lax.optimization_barrier((source, reads[-1]))
      y = jax.checkpoint(read)(phi, query, source)
      # Kept are the gate and the read in the model's dtype, not in float32.
      reads.append(jax.checkpoint(Phi.gated)(phi, y))
    return reads
