"""Dense hidden connections: what a layer does with the layers below it.

A mixer hands over what it has (its own inputs, its own read and query) and gets back the
fused form; it knows nothing of fusion, and this file knows nothing of families. The same
code serves a sequence, [B, T, ...], and one token of decoding, [B, ...].
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self, cast

import jax
from flax import nnx

from dense_jax.config import ModelConfig, invalid
from dense_jax.layers.fusion import FUSIONS
from dense_jax.layers.linear import RMSNorm
from dense_jax.layers.transition import Phi, Reads, Transition, make_gates, of_source
from dense_jax.ops.state_sequence import Mapped, StateSequence, TokenState
from dense_jax.types import Array

Shared = StateSequence | Mapping[str, Array] | None
"""What a layer leaves for deeper ones: its states, or its recurrence's inputs."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusedStates:
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

  def own_query(self, query: Array) -> Array:
    """The query for the layer's own states: a fusion may map them too."""
    return self.fusion.query(query, 0) if self.inject == "state" else query

  def fuse_reads(
      self,
      x: Array,
      own: Array,
      query: Array,
      states: StateSequence,
      shallow: Sequence[Shared],
  ) -> tuple[Array, StateSequence]:
    """Equations (3) and (4): joins the own read with lazy reads of the sources' states.

    Args:
      x: the layer's input after its norm, [..., D].
      own: what `own_query` read of the own states, [..., E] or [..., H, P], float32.
      query: the mixer's query, [..., N] or [..., J, N], or [E, N] if it is fixed.
      states: the layer's own states.
      shallow: what the sources shared, nearest first.

    Returns:
      The fused read, float32 (what the sources add is rounded to x's dtype), and the
      states that this layer shares: its own or the fused ones.
    """
    if self.inject != "state":
      return own, states.shared()
    sources = [cast(StateSequence, source) for source in shallow]

    def read(phi: Phi, query: Array, source: StateSequence) -> Array:
      return phi.read(source, query).astype(x.dtype)

    if self.remat_reads:
      read = jax.checkpoint(read)
    reads: list[Array] = []
    for index, source in enumerate(sources):
      phi = self.transition.phi(x, own.shape, index)
      if self.remat_reads and reads:
        # One read after the other, also in the backward pass: so that no two reads'
        # intermediate values exist together.
        source, reads[-1] = jax.lax.optimization_barrier((source, reads[-1]))
      reads.append(phi.gated(read(phi, self.fusion.query(query, index + 1), source)))
    fused = self.fusion(x, own, reads)
    if not self.share_fused:
      return fused, states.shared()
    phi = self.transition.phi(x, own.shape, 0)
    if isinstance(states, TokenState):  # One token's states are there: no chain is needed.
      below = phi.project(sources[0].materialize(), phi.state_gate)
      return fused, states.plus(phi.gated(below))
    return fused, FusedStates(states.shared(), sources[0], phi)
