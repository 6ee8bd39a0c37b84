"""Records a run's metrics together with what they cost: memory, utilization, time that was lost."""

import time
from collections.abc import Mapping

import jax
from etils import epath

from dense_jax import distributed
from dense_jax.config import ExperimentConfig
from dense_jax.costs.chips import find_chip
from dense_jax.models.flops import train_flops
from dense_jax.runs.life import first_start
from dense_jax.runs.memory import peak_memory
from dense_jax.training.loop import DATA_WAIT, SPEED, TRAIN_SECONDS
from dense_jax.training.metrics import MetricsWriter, read_metrics
from dense_jax.training.wandb_writer import WandbWriter

HOST_MEMORY = "peak_memory_bytes"
DEVICE_MEMORY = "peak_device_memory_bytes"
MFU, GOODPUT, CHECKPOINT_SECONDS = "mfu", "goodput", "checkpoint_seconds"
# Numbers that say how a machine did, not what the run has learned.
OF_MACHINE = frozenset({
    SPEED, HOST_MEMORY, DEVICE_MEMORY, MFU, GOODPUT, DATA_WAIT, TRAIN_SECONDS, CHECKPOINT_SECONDS,
})


class Recorder(MetricsWriter):
  """A `MetricsWriter` that knows the newest number of each name, and adds those of the machine.

  Each record with a training speed also gets

  - the largest resident set size of the first process and, if its first device reports it, the peak
    of that device's memory, both in bytes;
  - `mfu`, the model FLOPs (`dense_jax.models.flops`) that the devices do, as a share of their
    published peak, if it is known (`dense_jax.costs.chips`);
  - `train_seconds`, the time of all steps that the run stands on, without evaluations, saves and
    what was lost by going back; and `goodput`, its share of the time since the run first began.

  Attributes:
    newest: name -> newest number, from this process or an earlier one of the run.
    recorded: names of the numbers that were recorded of the first step by earlier processes.
  """

  def __init__(self, workdir: epath.Path, first_step: int, config: ExperimentConfig) -> None:
    """Opens the files in the first process; the others write nothing.

    Args:
      workdir: the run's folder.
      first_step: the step from which the run starts or resumes.
      config: the run's configuration.
    """
    self.newest: dict[str, float] = {}
    self.recorded: set[str] = set()
    for record in read_metrics(workdir):
      if record["step"] <= first_step:
        self._remember(record)
      if record["step"] == first_step:
        self.recorded |= record.keys()
    is_first = distributed.is_first()
    project = config.watch.wandb if is_first else ""
    also = [WandbWriter(workdir, project, config)] if project else []
    super().__init__(workdir, first_step, enabled=is_first, also=also)
    self._train_seconds = self.newest.get(TRAIN_SECONDS, 0.0)
    self._began = first_start(workdir)
    chip = find_chip(jax.devices()[0].device_kind)
    self._peak = chip.flops * jax.device_count() if chip else 0.0
    self._flops = train_flops(config.model, config.data.seq_len) if chip else 0

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one record; adds the numbers of the machine if it has a training speed."""
    if SPEED in values:
      values = {**values, **_peaks(), **self._shares(values)}
    self._remember(values)
    super().write(step, values)

  def _shares(self, values: Mapping[str, float]) -> dict[str, float]:
    self._train_seconds += values[TRAIN_SECONDS]
    passed = max(time.time() - self._began, self._train_seconds, 1e-9)
    shares = {TRAIN_SECONDS: self._train_seconds, GOODPUT: self._train_seconds / passed}
    return shares | ({MFU: values[SPEED] * self._flops / self._peak} if self._peak else {})

  def _remember(self, values: Mapping[str, float]) -> None:
    self.newest |= {name: value for name, value in values.items() if name != "step"}


def _peaks() -> dict[str, float]:
  peaks = {HOST_MEMORY: peak_memory()}
  on_device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  return peaks | ({DEVICE_MEMORY: on_device} if on_device else {})
