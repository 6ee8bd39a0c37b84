"""The time of a train step over that of another, measured on this machine's devices.

    python -m dense_jax.sweeps.timing WORKDIR WORKDIR

prints the ratio of two runs' steps: of the first one's over the second's. Without folders, it
prints the kind of device that would run them.
"""

import dataclasses
import functools
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from dense_jax import experiment, sharding
from dense_jax.config import ExperimentConfig
from dense_jax.training.step import Trainer

_PAIRS, _STEPS = 5, 3


@functools.cache  # It stays the same, and a process takes seconds to start.
def device_kind() -> str:
  """Returns the kind of device, as jax names it, on which `time_ratio` measures.

  Raises:
    RuntimeError: the process that looks at the devices failed.
  """
  return _printed()


def time_ratio(config: ExperimentConfig, other: ExperimentConfig) -> float:
  """Measures the time of a train step over that of another, in a process of its own.

  A process that trains takes accelerators for as long as it lives, and runs of a sweep need them.

  Raises:
    RuntimeError: the process failed.
  """
  with tempfile.TemporaryDirectory() as temporary:
    folders = []
    for name, each in (("one", config), ("other", other)):
      folders.append(pathlib.Path(temporary, name))
      folders[-1].mkdir()
      experiment.save(each, epath.Path(folders[-1]))
    return float(_printed(*map(str, folders)))


def _printed(*folders: str) -> str:
  """Returns what this module prints in a process of its own."""
  done = subprocess.run(
      [sys.executable, "-m", "dense_jax.sweeps.timing", *folders],
      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False,
  )
  if done.returncode:
    raise RuntimeError(f"the process that times steps ended with status {done.returncode}")
  return done.stdout.strip()


def step_time_ratio(config: ExperimentConfig, other: ExperimentConfig) -> float:
  """Measures the time of a train step over that of another, in turn, in this process.

  Returns:
    The median of the ratios of five pairs.
  """
  first, second = _Timed(config), _Timed(other)
  return statistics.median(first.seconds() / second.seconds() for _ in range(_PAIRS))


class _Timed:
  """A train step on random tokens."""

  def __init__(self, config: ExperimentConfig) -> None:
    trainer = Trainer(config, sharding.make_mesh(config.mesh))
    shapes = trainer.batch_shapes(config.train.batch_size, config.data.seq_len)
    key = jax.random.key(0)
    tokens = jax.random.randint(key, shapes.tokens_BT.shape, 0, config.model.vocab_size)
    ones = jnp.ones_like(tokens)
    batch = dataclasses.replace(
        jax.tree.map(lambda shape: ones.astype(shape.dtype), shapes),
        tokens_BT=tokens, targets_BT=tokens,
    )
    self._batch = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), batch, shapes)
    self._step, self._state = trainer.train_step, trainer.init(0)
    self.seconds()  # Compiles.

  def seconds(self) -> float:
    """Runs a few steps, and returns their time."""
    begin = time.perf_counter()
    for _ in range(_STEPS):
      self._state, metrics = self._step(self._state, self._batch)
    jax.block_until_ready(metrics)
    return time.perf_counter() - begin


def main(arguments: Sequence[str]) -> None:
  """Prints the ratio of the times of two runs' steps, or the kind of device."""
  if not arguments:
    print(jax.devices()[0].device_kind)
    return
  one, other = (experiment.read(epath.Path(folder)) for folder in arguments)
  print(step_time_ratio(one, other))


if __name__ == "__main__":
  main(sys.argv[1:])
