"""The inputs of the kernels of matrix states, for TPUs and GPUs alike."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dense_jax.errors import InputError
from dense_jax.ops import partition
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import WIDTH_AXIS, Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """One matrix-state recurrence, with the query of its read.

  Attributes:
    q_BTJN: queries, bfloat16 or float32; head h uses those of group h // (H / J).
    k_BTJN: keys, zero at padding.
    v_BTE: values.
    scale_BTH: float32 factor of the values; None means 1.
    log_decay_BTH: float32, <= 0, zero at padding; its B may be 1 (a decay that all rows share).
    initial_BHPN: float32 state before the first token; None means zero.
    gate: the index of the read's gate, which sources may share; None means 1.
    joins: true if its states are added to those of the source before it, which has the same
      queries, gate and decays: the sum is one recurrence with several keys and values a token, and
      is read once. The gradient of the decays, and of the state before the first token, is then
      that of all such sources together.
  """

  q_BTJN: Array
  k_BTJN: Array
  v_BTE: Array
  scale_BTH: Array | None
  log_decay_BTH: Array
  initial_BHPN: Array | None
  gate: int | None = dataclasses.field(default=None, metadata={"static": True})
  joins: bool = dataclasses.field(default=False, metadata={"static": True})

  def check(self, other: "Source") -> None:
    """Checks that shapes fit each other, and those of another source."""
    batch, time, groups, state_size = other.k_BTJN.shape
    heads, width = other.log_decay_BTH.shape[2], other.v_BTE.shape[2]
    chex.assert_is_divisible(heads, groups)
    chex.assert_shape([self.q_BTJN, self.k_BTJN], (batch, time, groups, state_size))
    chex.assert_shape(self.v_BTE, (batch, time, width))
    chex.assert_shape(other.log_decay_BTH, ({1, batch}, time, heads))
    chex.assert_equal_shape([self.log_decay_BTH, other.log_decay_BTH])
    chex.assert_type(self.log_decay_BTH, jnp.float32)
    assert not self.joins or self.initial_BHPN is None
    if self.scale_BTH is not None:
      chex.assert_shape(self.scale_BTH, (batch, time, heads))
    if self.initial_BHPN is not None:
      chex.assert_shape(self.initial_BHPN, (batch, heads, width // heads, state_size))
      chex.assert_type(self.initial_BHPN, jnp.float32)

  def specs(self, implementation: str, width: int) -> Any:
    """Returns the source with specs for its arrays; `width` is the size of the mesh's width axis.

    Raises:
      InputError: the mesh would split a group of heads that share keys.
    """
    groups = self.k_BTJN.shape[2]
    if groups > 1 and groups % width:
      raise InputError(
          f"config.mesh.{WIDTH_AXIS} = {width} is not valid: with "
          f"implementation={implementation} it has to divide the {groups} groups of heads that "
          "share keys"
      )
    heads = partition.by_row(None, WIDTH_AXIS)
    keys = partition.by_row(None, WIDTH_AXIS if groups > 1 else None)
    shared = self.log_decay_BTH.shape[0] == 1
    return dataclasses.replace(
        self, q_BTJN=keys, k_BTJN=keys, v_BTE=heads,
        scale_BTH=partition.unless_none(self.scale_BTH, heads),
        log_decay_BTH=partition.split(None, None, WIDTH_AXIS) if shared else heads,
        initial_BHPN=partition.unless_none(self.initial_BHPN, partition.by_row(WIDTH_AXIS)),
    )


def check_inputs(
    sources: Sequence[Source], gates: Sequence[Array | LowRankGate], resets_BT: Array | None,
    epilogue: Epilogue,
) -> None:
  """Checks that the shapes of what kernels take fit each other."""
  own = sources[0]
  batch, time, width = own.v_BTE.shape
  for source in sources:
    source.check(own)
  for gate in gates:
    if isinstance(gate, LowRankGate):
      rank = len(gate.up_RE)
      chex.assert_shape(gate.hidden_R, (batch, time, rank))
      chex.assert_shape(gate.up_RE, (rank, width))
    else:
      chex.assert_shape(gate, (batch, time, width))
  if resets_BT is not None:
    chex.assert_shape(resets_BT, (batch, time))
  epilogue.check(batch, time, width, own.log_decay_BTH.shape[2])
