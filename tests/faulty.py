"""Faults in a run's numbers, for tests alone: chosen batches have a NaN, an Inf or a spike.

A fault belongs to a batch, by the batch's number and its tokens, so that a run which resumes, goes
back or passes over batches meets it exactly where that batch comes. In this process:

    faulty.install(monkeypatch, {3: "nan", 5: "spike"})

In another one, the command after the faults runs with them:

    python -m tests.faulty 3:nan,5:spike dense_jax.cli.train --config ... --workdir ...
"""

import runpy
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data.batches import TrainBatches
from dense_jax.training import step

# Kind -> factors of the loss and of all gradients. Ten times the loss is far more than ten standard
# deviations above that of its neighbours.
KINDS = {"nan": (np.nan, np.nan), "inf gradient": (1.0, np.inf), "spike": (10.0, 1e3)}


def _checksum(tokens_BT):
  """Returns a uint32 that tells batches apart, for NumPy and jax arrays alike."""
  library = np if isinstance(tokens_BT, np.ndarray) else jnp
  places = library.arange(tokens_BT.size, dtype=library.uint32) * library.uint32(2654435761)
  values = tokens_BT.reshape(-1).astype(library.uint32) + library.uint32(1)
  return library.sum(values * (places | library.uint32(1)), dtype=library.uint32)


def install(monkeypatch: pytest.MonkeyPatch, faults: Mapping[int, str]) -> None:
  """Gives the batches of these numbers (from 0) their faults, in runs that begin from here on."""
  known: dict[int, str] = {}  # By the batch's checksum, known before a step is traced.
  init, gradients = TrainBatches.__init__, step._gradients

  def init_and_look(self, store, seq_len, batch_size, seed, start_step=0, rows=None, **options):
    init(self, store, seq_len, batch_size, seed, start_step, rows, **options)
    for number, kind in faults.items():
      whole = object.__new__(TrainBatches)
      init(whole, store, seq_len, batch_size, seed, number, **options)
      known[int(_checksum(np.asarray(next(whole).tokens_BT)))] = kind
      whole.close()

  def faulty_gradients(model, params, batch, config, measure):
    found = gradients(model, params, batch, config, measure)
    check = _checksum(batch.tokens_BT)
    of_loss = of_gradients = jnp.ones(())
    for checksum, kind in known.items():
      is_it = check == jnp.uint32(checksum)
      of_loss = jnp.where(is_it, KINDS[kind][0], of_loss)
      of_gradients = jnp.where(is_it, KINDS[kind][1], of_gradients)
    scaled = jax.tree.map(lambda leaf: leaf * of_gradients, found.gradients)
    return found._replace(loss=found.loss * of_loss, gradients=scaled)

  monkeypatch.setattr(TrainBatches, "__init__", init_and_look)
  monkeypatch.setattr(step, "_gradients", faulty_gradients)


def main() -> None:
  """Runs the module that the second argument names, with the faults of the first."""
  faults, module, *arguments = sys.argv[1:]
  pairs = [fault.split(":") for fault in faults.split(",") if fault]
  install(pytest.MonkeyPatch(), {int(number): kind for number, kind in pairs})
  sys.argv = [module, *arguments]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
