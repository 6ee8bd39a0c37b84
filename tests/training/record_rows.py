"""Trains as dense_jax.cli.train does, and writes down the rows of each step's batch."""

import hashlib
import json
import os
import pathlib

import jax
import numpy as np

from dense_jax.cli import common
from dense_jax.cli import train as command
from dense_jax.runs import training

_train = training.train


class _Recorded:
  """Batches, each of whose rows in this process is written down with its step."""

  def __init__(self, batches, step):
    self._batches, self._step = batches, step
    # The launcher, of which there is one for each start, is the parent of all its processes.
    name = f"{os.getppid()}-{jax.process_index()}"
    self._file = pathlib.Path(os.environ["RECORDED_ROWS"]) / name

  def __next__(self):
    batch = next(self._batches)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    rows = [
        hashlib.sha256(b"".join(np.ascontiguousarray(leaf[row]).tobytes() for leaf in leaves))
        .hexdigest() for row in range(len(leaves[0]))
    ]
    with open(self._file, "a") as file:
      file.write(json.dumps([self._step, rows]) + "\n")
    self._step += 1
    return batch


def _recording(trainer, state, batches, **options):
  return _train(trainer, state, _Recorded(batches, int(state.step)), **options)


if __name__ == "__main__":
  training.train = _recording
  common.run(command.main)
