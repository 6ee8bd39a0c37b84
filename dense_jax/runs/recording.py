"""Records a run's metrics together with its peak memory."""

from collections.abc import Mapping

import jax
from etils import epath

from dense_jax import distributed
from dense_jax.runs.memory import peak_memory
from dense_jax.training.metrics import MetricsWriter, read_metrics

HOST_MEMORY = "peak_memory_bytes"
DEVICE_MEMORY = "peak_device_memory_bytes"


class Recorder(MetricsWriter):
  """A `MetricsWriter` that knows the newest number of each name, and adds peak memory sizes.

  Each record with a training speed also gets the largest resident set size of the first process
  and, if its first device reports it, the peak of that device's memory, both in bytes.

  Attributes:
    newest: name -> newest number, from this process or an earlier one of the run.
  """

  def __init__(self, workdir: epath.Path, first_step: int) -> None:
    """Opens the files in the first process; the others write nothing.

    Args:
      workdir: the run's folder.
      first_step: the step from which the run starts or resumes.
    """
    self.newest: dict[str, float] = {}
    for record in read_metrics(workdir):
      if record["step"] <= first_step:
        self._remember(record)
    super().__init__(workdir, first_step, enabled=distributed.is_first())

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one record; adds the peak memory sizes if it has a training speed."""
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
