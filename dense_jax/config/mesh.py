"""The mesh of devices: `config.mesh`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import integer


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config, key="config.mesh"):
  """Devices by axis; one size may be -1, which takes the devices that are left."""

  slices: int = integer(
      0, 0, help="groups of devices joined by a slower network only (TPU slices), each with its "
      "part of the batch; 0 means what the devices say")
  data: int = integer(-1, -1, help="replicas of the parameters, each with its part of the batch")
  fsdp: int = integer(1, -1, help="parts of the parameters, which divide the batch too")
  sequence: int = integer(1, -1, help="parts of each row's tokens")
  tensor: int = integer(1, -1, help="parts of heads and channels")
