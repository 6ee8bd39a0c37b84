"""State injection (arXiv 2403.00818, section 3): a layer reads the states of layers below it."""

import functools
from collections.abc import Sequence
from typing import cast

from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.dense.connection import NoConnection, Shared
from dense_jax.layers.dense.fused_states import fused_states
from dense_jax.layers.dense.fusion import FUSIONS
from dense_jax.layers.dense.transition import ReadShape, Transition
from dense_jax.layers.metrics import record_ratio, record_rms, record_spread
from dense_jax.layers.observation import observe
from dense_jax.ops.epilogue import Epilogue, Output
from dense_jax.ops.recurrence import Read, Recurrence, gate_value
from dense_jax.types import Array


class StateInjection(NoConnection):
  """Equations (3) and (4), for the layer's own states h and the states h_i of the i-th layer below.

      h' = Fuse(h, phi_1(h_1), ..., phi_S(h_S))        y = C h'

  h' is only read, never carried to the next token, so each layer's recurrence is unchanged. No
  states are stored: where phi and Fuse are linear in states, reading h' is the sum of reads of h
  and each h_i, each with a query of its own.

  Args:
    config: the model.
    reads: the number and shape of reads.
  """

  def __init__(self, config: ModelConfig, reads: ReadShape, rngs: nnx.Rngs) -> None:
    super().__init__("state")
    self.transition = Transition(config, reads, rngs)
    self.fusion = FUSIONS[config.dense.fusion](config, reads, rngs)
    self.share_fused = config.dense.source == "fused"
    self.recompute = config.remat in ("reads", "full")

  def run(
      self, x_D: Array, query: Array, states: Recurrence, shallow: Sequence[Shared],
      epilogue: Epilogue,
  ) -> tuple[Output, Array, Recurrence]:
    """See `Connection`."""
    observe("state", states.materialize)
    sources = [cast(Recurrence, source) for source in shallow]
    phis = self.transition(x_D)
    own_query, *queries = self.fusion.queries(query)
    reads = [
        phi.as_read(source, source_query, dtype=x_D.dtype, recompute=self.recompute)
        for phi, source, source_query in zip(phis, sources, queries, strict=True)
    ]
    _record(states, own_query, reads)
    output, final = self.fusion(x_D, states, own_query, reads, epilogue)
    if self.share_fused:  # One source, as its h' contains those of all layers below.
      states = fused_states(states, sources[0], phis[0])
    return output, final, states


def _record(states: Recurrence, own_query: Array, reads: Sequence[Read]) -> None:
  """Records the RMS of the own read and, for each source, of its gated read, and its gate."""
  own = record_rms("own_read_rms", lambda: states.read(own_query))
  for number, read in enumerate(reads, 1):
    if read.gate is not None:
      record_spread(f"gate_{number}", functools.partial(gate_value, read.gate))
    source = record_rms(f"source_{number}_read_rms", read.value)
    record_ratio(f"source_{number}_ratio", source, own)
