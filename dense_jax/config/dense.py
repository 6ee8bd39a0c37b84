"""Dense hidden connections: `config.model.dense`."""

import dataclasses

from dense_jax.config.fields import choice, flag, integer, invalid


@dataclasses.dataclass(frozen=True)
class DenseConfig:
  """Dense hidden connections (arXiv 2403.00818); docs/dense.md says when to use which."""

  depth: int = integer(
      0, 0, help="m: how many of the layers directly below each dense layer reads, fewer than "
      "model.layers; 0 means the base model")
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
    if self.inject == "inputs":
      self._require("with inject=inputs, which adds vectors and reads no states",
                    transition=("identity",), gate=("none", "channel"), fusion=("add",))
    elif self.source == "fused":
      self._require("with inject=state and source=fused, a chain of linear reads",
                    depth=(0, 1), transition=("identity", "linear"), fusion=("add",))

  def _require(self, why: str, **valid: tuple[object, ...]) -> None:
    for name, options in valid.items():
      value = getattr(self, name)
      if value not in options:
        raise invalid(
            f"config.model.dense.{name}", value, f"{' or '.join(map(str, options))} {why}"
        )

  def sources(self, layer: int) -> int:
    """Returns S, the number of layers that a layer reads."""
    dense = layer >= self.start and (layer - self.start) % self.stride == 0
    return min(layer, self.depth) if dense else 0
