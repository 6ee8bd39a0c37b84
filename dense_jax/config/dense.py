"""Dense hidden connections: `config.model.dense`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import choice, flag, integer, invalid


@dataclasses.dataclass(frozen=True)
class DenseConfig(Config, key="config.model.dense"):
  """Dense hidden connections (arXiv 2403.00818); docs/dense.md says when to use which."""

  depth: int = integer(
      0, 0, help="m: how many layers below it each dense layer reads, fewer than model.layers; 0 "
      "means the base model")
  reads: str = choice(
      "nearest", "nearest", "first", "spread",
      help="which layers those are: the m directly below (nearest), the m lowest of all (first), "
      "or those 1, 2, 4, 8, ... below (spread)")
  start: int = integer(
      1, 1, help="the first dense layer, counted from 0; layer 0 has nothing below it")
  stride: int = integer(1, 1, help="every stride-th layer from start on is dense")
  inject: str = choice(
      "state", "state", "inputs",
      help="what is fused: reads of shallow states (state, equations 3 and 4) or the inputs of "
      "the state, before the recurrence (inputs, equation 5, as the released DenseRetNet does)")
  source: str = choice(
      "raw", "raw", "fused",
      help="what a shallow layer shares: its own states or inputs (raw), or those that it fused "
      "itself; fused states need depth 1 and cost one read for each layer below")
  transition: str = choice(
      "identity", "identity", "linear", "mlp",
      help="the projection of a shallow state: none, a linear map over the state axis for each "
      "source, or h + U silu(V h), which is read token by token and therefore slow")
  transition_rank: int = integer(8, 1, help="rank of the mlp transition")
  gate: str = choice(
      "channel", "none", "channel", "channel_state",
      help="what the transition's gate scales: nothing, each channel of a read, or each channel "
      "and each number of the state axis")
  gate_sharing: str = choice(
      "shared", "shared", "per_source", help="one gate for all sources, or one for each")
  gate_reduction: int = integer(
      32, 1, help="the rank of gates and of fusions' maps is width / gate_reduction, at least 1")
  gate_init: str = choice(
      "zeros", "zeros", "normal",
      help="how the gate's last matrix starts: zeros starts as the base model, normal is Xavier "
      "uniform, as in the released DenseRetNet")
  fusion: str = choice(
      "add", "add", "concat", "gated", "attention",
      help="how reads join the layer's own: by a sum, a linear map over the concatenated states, "
      "a mixture for each channel, or attention over the sources")
  input_norm: bool = flag(
      True, help="with inject=inputs, whether RMSNorm follows the fusion, as in the released "
      "DenseRetNet; without it a gate of zero is the base model exactly")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.inject == "inputs":
      self._require("with inject=inputs, which adds vectors and reads no states",
                    transition=("identity",), gate=("none", "channel"), fusion=("add",))
    elif self.source == "fused":
      self._require("with inject=state and source=fused, a chain of linear reads",
                    depth=(0, 1), transition=("identity", "linear"), fusion=("add",))
    if self.source == "fused":
      self._require("with source=fused, a chain from layer to layer", reads=("nearest",))

  def _require(self, why: str, **valid: tuple[object, ...]) -> None:
    for name, options in valid.items():
      value = getattr(self, name)
      if value not in options:
        raise invalid(
            f"config.model.dense.{name}", value, f"{' or '.join(map(str, options))} {why}"
        )

  def layers_read(self, layer: int) -> tuple[int, ...]:
    """Returns the layers that a layer reads, in the order of its sources.

    The nearest comes first, with reads=first the lowest. A larger depth only adds to the end.
    """
    if layer < self.start or (layer - self.start) % self.stride:
      return ()
    if self.reads == "first":
      return tuple(range(min(layer, self.depth)))
    return tuple(layer - distance for distance in self.distances if distance <= layer)

  def sources(self, layer: int) -> int:
    """Returns S, the number of layers that a layer reads."""
    return len(self.layers_read(layer))

  @property
  def distances(self) -> tuple[int, ...]:
    """The distances of a layer to those that it reads; () with reads=first."""
    return {
        "nearest": tuple(range(1, self.depth + 1)),
        "spread": tuple(2**number for number in range(self.depth)),
    }.get(self.reads, ())

  @property
  def reach(self) -> int:
    """The greatest of the distances; 0 with reads=first and without dense connections."""
    return max(self.distances, default=0)

  @property
  def first_full(self) -> int:
    """The lowest layer below which all m layers are that it may read."""
    return self.depth if self.reads == "first" else self.reach
