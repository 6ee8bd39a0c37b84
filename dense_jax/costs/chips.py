"""Published figures of chips, and the bounds that they set.

TPUs: the vendor's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU
documentation, table "Key specifications": peak compute a chip (bf16), HBM capacity and
bandwidth, bidirectional inter-chip interconnect (ICI) bandwidth. Its page of v4 has no ICI
bandwidth; six links of 50 GB/s in each direction are those of arXiv 2304.01433, table 4.
GPUs: the vendor's data sheets of H100 SXM and H200 SXM, dense bf16 (without sparsity);
their link is NVLink.

Capacities are decimal gigabytes, as published, although some of the vendor's figures are
GiB: the few percent between the two are left to what else lives on a chip, such as the
next batch and other programs.
"""

import dataclasses

from dense_jax.costs.hlo import Cost


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, which is one jax device (v4 and v5p: both cores together).

  Attributes:
    flops: bf16 matmul operations a second, at most.
    memory: bytes of main memory (HBM).
    memory_bandwidth: its bytes a second.
    link_bandwidth: bytes a second to other chips, over all links and both directions
      together.
    axes: dimensions of a topology; 0 for GPUs.
  """

  flops: float
  memory: int
  memory_bandwidth: float
  link_bandwidth: float
  axes: int = 0


CHIPS = {
    "v4": Chip(275e12, 32 * 10**9, 1200e9, 600e9, axes=3),
    "v5e": Chip(197e12, 16 * 10**9, 819e9, 400e9, axes=2),
    "v5p": Chip(459e12, 95 * 10**9, 2765e9, 1200e9, axes=3),
    "v6e": Chip(918e12, 32 * 10**9, 1640e9, 800e9, axes=2),
    "h100": Chip(989e12, 80 * 10**9, 3350e9, 900e9),
    "h200": Chip(989e12, 141 * 10**9, 4800e9, 900e9),
}


@dataclasses.dataclass(frozen=True)
class Bound:
  """Seconds that a program takes at least, if one thing alone held it up.

  Attributes:
    compute: its matmuls at the chip's peak.
    memory: its bytes at the memory's bandwidth.
    collectives: their bytes at the links' bandwidth.
  """

  compute: float
  memory: float
  collectives: float

  @property
  def seconds(self) -> float:
    """The largest of them: no run is faster. It is no estimate of a run's time."""
    return max(self.compute, self.memory, self.collectives)


def bound(cost: Cost, chip: Chip) -> Bound:
  """What the published peaks of a chip allow at most.

  A collective whose larger side has n bytes takes in and sends out n together, or more,
  among two chips or more; so n at the links' bandwidth in both directions is a bound for
  every kind.
  """
  return Bound(
      cost.matmul_flops / chip.flops,
      cost.bytes_accessed / chip.memory_bandwidth,
      sum(collective.bytes for collective in cost.collectives) / chip.link_bandwidth,
  )
