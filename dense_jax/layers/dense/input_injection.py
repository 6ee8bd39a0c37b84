"""Input injection (arXiv 2403.00818, released code): shallower inputs enter a recurrence."""

import functools
from collections.abc import Mapping, Sequence
from typing import cast

from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.dense.connection import FusedInputs, Inputs, NoConnection, Shared
from dense_jax.layers.dense.gate import low_rank_gates, make_gates, of_source
from dense_jax.layers.linear import RMSNorm
from dense_jax.layers.metrics import record_ratio, record_rms, record_spread
from dense_jax.ops import resolver
from dense_jax.ops.injection import gated_input
from dense_jax.ops.recurrence import LowRankGate, Recurrence
from dense_jax.types import Array


class InputInjection(NoConnection):
  """Equation (5), for each input k of the recurrence.

      k' = RMSNorm(k + sum_i gate_k(x) * k_i)

  where k_i is the same input of the i-th layer below, before that layer's own fusion or, if
  `source` is "fused", after it.

  Args:
    config: the model.
    sources: S, the layers that are read.
    inputs: name -> (width, logical axis) of the recurrence's inputs.
    form: the form of the mixer's state.
  """

  def __init__(
      self, config: ModelConfig, *, sources: int,
      inputs: Mapping[str, tuple[int, str | None]], form: str, rngs: nnx.Rngs,
  ) -> None:
    super().__init__("inputs")
    self.join_gates = resolver.joins_narrow_products()
    self.inject_input = resolver.injection(form, config.implementation)
    self.share_fused = config.dense.source == "fused"
    if config.dense.gate != "none":
      self.gates = nnx.Dict({
          name: make_gates(config, sources, width, axis, rngs)
          for name, (width, axis) in inputs.items()
      })
    self.norms = nnx.Dict({
        name: RMSNorm(width, axis=axis, epsilon=config.norm_eps, rngs=rngs)
        for name, (width, axis) in inputs.items()
        if config.dense.input_norm
    })

  def fuse_inputs(self, x_D: Array, own: Inputs, shallow: Sequence[Shared]) -> FusedInputs:
    """See `Connection`."""
    injected = {}
    low_rank: dict[str, list[LowRankGate]] = {}
    if hasattr(self, "gates"):
      low_rank = low_rank_gates(self.gates, x_D, joined=self.join_gates)
    for name, value in own.items():
      reads = [cast(Inputs, source)[name] for source in shallow]
      gates: Sequence[LowRankGate | None] = [None] * len(reads)
      if low_rank:
        gates = [of_source(low_rank[name], index) for index in range(len(reads))]
      self._record(name, value, reads, gates)
      injected[name] = self.inject_input(value, reads, gates, self.norms.get(name))
    return FusedInputs(
        {name: value.fused_E for name, value in injected.items()},
        {name: value.own_E for name, value in injected.items()},
        {name: value.shared_E for name, value in injected.items()},
    )

  def _record(
      self, name: str, own: Array, reads: Sequence[Array], gates: Sequence[LowRankGate | None]
  ) -> None:
    """Records the metrics of an input."""
    own_rms = record_rms(f"{name}_rms", own)
    for index, (read, gate) in enumerate(zip(reads, gates, strict=True)):
      if gate is not None:
        record_spread(f"{name}_gate_{index + 1}", gate.value)
      source_rms = record_rms(
          f"{name}_source_{index + 1}_rms", functools.partial(gated_input, read, gate)
      )
      record_ratio(f"{name}_source_{index + 1}_ratio", source_rms, own_rms)

  def share(self, inputs: FusedInputs, states: Recurrence) -> Shared:
    """See `Connection`."""
    del states
    return inputs.fused if self.share_fused else inputs.shared
