"""Figures of chips, and the bounds and estimates of time that follow from them.

TPUs: table "Key specifications" of the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" in the
Cloud TPU documentation: peak compute per chip (bf16), HBM capacity and bandwidth, bidirectional
inter-chip interconnect (ICI) bandwidth. The page of v4 gives no ICI bandwidth; its six links of
50 GB/s in each direction are from arXiv 2304.01433, table 4.
GPUs: the vendor's data sheets of H100 SXM and H200 SXM, dense bf16 (without sparsity); their
link is NVLink. Their ceilings were measured on one H100 80GB HBM3 on 2026-11-26: a bf16 product of
8192 x 8192 matrices, and a copy of a large array (experiments/results/gpu_rates_2026-11-26.json).
From them follow the steps of five models in XLA's forms, measured on it, within 3 %. Steps with
kernels took 1.1 to 3 times an H100's estimate on an H200, and 1.4 to 3.6 times that for an H200
(experiments/results/gpu_h200_2026-11-28.json). It has an H100's cores, and is given the same share
of its published bandwidth.

Capacities are decimal gigabytes, as published, although some of the vendor's figures are really
GiB. The few percent in between are a reserve for whatever else is in a chip's memory, such as
the next batch and other programs.
"""

import dataclasses

from dense_jax.costs.hlo import Cost


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """The rates that one large operation reaches: matmul FLOP/s, and bytes/s of main memory."""

  flops: float
  memory_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, which is one jax device (on v4 and v5p, both cores together).

  Attributes:
    flops: peak bf16 matmul operations per second.
    memory: capacity of main memory (HBM), in bytes.
    memory_bandwidth: peak bandwidth of main memory, in bytes per second.
    link_bandwidth: bandwidth to other chips, in bytes per second, summed over all links and both
      directions.
    axes: the number of dimensions of a topology: 2 or 3 for TPUs, 1 for GPUs.
    ceilings: measured ceilings; None if there are none.
  """

  flops: float
  memory: int
  memory_bandwidth: float
  link_bandwidth: float
  axes: int
  ceilings: Ceilings | None = None

  @property
  def is_gpu(self) -> bool:
    """True for a GPU, False for a TPU."""
    return self.axes == 1


CHIPS = {
    "v4": Chip(275e12, 32 * 10**9, 1200e9, 600e9, 3),
    "v5e": Chip(197e12, 16 * 10**9, 819e9, 400e9, 2),
    "v5p": Chip(459e12, 95 * 10**9, 2765e9, 1200e9, 3),
    "v6e": Chip(918e12, 32 * 10**9, 1640e9, 800e9, 2),
    "h100": Chip(989e12, 80 * 10**9, 3350e9, 900e9, 1, Ceilings(790e12, 3.0e12)),
    "h200": Chip(989e12, 141 * 10**9, 4800e9, 900e9, 1, Ceilings(790e12, 4.3e12)),
}


# Names that jax gives to these chips -> theirs here. Cards of another form, with other clocks or
# memory, have longer or other names: H100 PCIe, H100 NVL, H200 NVL, a slice of a card (MIG).
_KINDS = {
    "tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p",
    "tpu v6 lite": "v6e", "tpu v6e": "v6e", "nvidia h100 80gb hbm3": "h100", "nvidia h200": "h200",
}


def find_chip(device_kind: str) -> Chip | None:
  """Returns the figures of a device, named as jax does ("NVIDIA H100 80GB HBM3"), if known."""
  name = _KINDS.get(device_kind.lower())
  return CHIPS[name] if name else None


@dataclasses.dataclass(frozen=True)
class Bound:
  """Lower bounds on the seconds that a program takes, one for each resource.

  Attributes:
    compute: its matmuls at the chip's peak.
    memory: its bytes of main memory at the memory's bandwidth.
    collectives: its collectives' bytes at the links' bandwidth.
  """

  compute: float
  memory: float
  collectives: float

  @property
  def seconds(self) -> float:
    """The largest of the bounds, in seconds. No run is faster, but most are slower."""
    return max(self.compute, self.memory, self.collectives)


def bound(cost: Cost, chip: Chip) -> Bound:
  """Returns the lower bounds on a program's time that follow from a chip's published peaks.

  Among two or more chips, a collective whose larger side (operand or result) has n bytes moves
  at least n bytes in and out of each chip together. So n divided by the links' bandwidth in both
  directions bounds the time of every kind of collective.
  """
  return Bound(
      cost.matmul_flops / chip.flops,
      cost.bytes_accessed / chip.memory_bandwidth,
      sum(collective.bytes for collective in cost.collectives) / chip.link_bandwidth,
  )


@dataclasses.dataclass(frozen=True)
class Estimate:
  """An estimate of the seconds that a program takes, one part after the other.

  Attributes:
    matmuls: its matmuls at the rate of a large one.
    memory: its bytes of main memory at the bandwidth of a copy.
  """

  matmuls: float
  memory: float

  @property
  def seconds(self) -> float:
    """The sum: kernels that compute and kernels that move data run one after the other.

    Collectives, launches and all other arithmetic are left out.
    """
    return self.matmuls + self.memory


def estimate(cost: Cost, chip: Chip) -> Estimate | None:
  """Returns the estimate from a chip's measured ceilings, or None if it has none."""
  if chip.ceilings is None:
    return None
  return Estimate(
      cost.matmul_flops / chip.ceilings.flops, cost.bytes_accessed / chip.ceilings.memory_bandwidth
  )
