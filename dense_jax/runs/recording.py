"""A run's records: its metrics, with the memory that it has taken so far."""

from collections.abc import Mapping

import jax
from etils import epath

from dense_jax import distributed
from dense_jax.runs.memory import peak_memory
from dense_jax.training.metrics import MetricsWriter, read_metrics

HOST_MEMORY = "peak_memory_bytes"
DEVICE_MEMORY = "peak_device_memory_bytes"


class Recorder(MetricsWriter):
  """A `MetricsWriter` that knows the newest number of each name, and adds peaks of memory.

  Each line that tells a training speed also has the first process's largest resident set, in
  bytes, and that of its first device's memory, where the device tells.

  Attributes:
    newest: name -> number, of this process and of the run's earlier ones.
  """

  def __init__(self, workdir: epath.Path, first_step: int) -> None:
    """Opens the files in the first process; the others write nothing.

    Args:
      workdir: the run's folder.
      first_step: the step from which the run goes on.
    """
    self.newest: dict[str, float] = {}
    for record in read_metrics(workdir):
      if record["step"] <= first_step:
        self._remember(record)
    super().__init__(workdir, first_step, enabled=distributed.is_first())

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line, and the peaks of memory where it is one of training."""
    if "tokens_per_second" in values:
      values = {**values, **_peaks()}
    self._remember(values)
    super().write(step, values)

  def _remember(self, values: Mapping[str, float]) -> None:
    self.newest |= {name: value for name, value in values.items() if name != "step"}


def _peaks() -> dict[str, float]:
  peaks = {HOST_MEMORY: peak_memory()}
  on_device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  return peaks | ({DEVICE_MEMORY: on_device} if on_device else {})
