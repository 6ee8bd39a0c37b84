"""Training several seeds of a small model at once by `jax.vmap`, against one after the other.

Command   nice -n 5 python -m experiments.benchmarks.seeds \
              --json experiments/results/seeds_DATE.json
Hardware  one core, to which the process confines itself: a sweep trains one run on each
Model     experiments/evidence.py, 2 rows of 256 tokens a step, float32; `gau_retnet` as it is, and
          `mamba2` as experiments/sweeps/families.py has it
Measured  a train step of one seed, and one of 2 and of 3 seeds whose states, batches and updates
          have one more axis. Steps of both alternate, and what counts is the CPU time of this
          process, so that whatever else the machine does hits both alike and little. A ratio is of
          tokens/s of all seeds together, the median over pairs
Bar       1.1: below it, seeds side by side by vmap are not worth a second way to train
Found     gau_retnet 0.71 and 0.66 (experiments/results/seeds_2026-11-27.json; mamba2 was not
          measured at that size): a sweep trains one seed a process
"""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dense_jax import experiment, sharding
from dense_jax.config import ExperimentConfig
from dense_jax.ops import resolver
from dense_jax.training.step import Trainer
from experiments.benchmarks import common
from experiments.benchmarks.common import Table

SEEDS = (2, 3)
BAR = 1.1
PAIRS, STEPS = 11, 2
# Name -> overrides.
MODELS: dict[str, dict[str, str]] = {
    "gau_retnet": {},
    "mamba2": {
        "model.family": "mamba2", "model.mixer.state_size": "32", "model.mixer.head_dim": "32",
    },
}


class Seeds:
  """The train step of several seeds at once; of one seed, the step as training has it.

  Attributes:
    tokens: tokens of a step, of all seeds together.
  """

  def __init__(self, settings: ExperimentConfig, count: int) -> None:
    """Compiles the step and runs it once.

    Args:
      settings: the model and its batch.
      count: the number of seeds, each with a batch of its own.
    """
    trainer = Trainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
    states = [trainer.init(seed) for seed in range(count)]
    batch = trainer.put(common.batch(settings, documents=1))
    self.tokens = count * settings.train.batch_size * settings.data.seq_len
    if count == 1:
      self._step: Any = trainer.train_step
      self._state, self._batch = states[0], batch
    else:
      self._step = jax.jit(
          jax.vmap(trainer.train_step), donate_argnums=0,
          compiler_options=resolver.training_options(),
      )
      self._state = jax.tree.map(lambda *each: jnp.stack(each), *states)
      # Rows in another order for each seed, so that no batch is shared.
      self._batch = jax.tree.map(
          lambda x: jnp.stack([jnp.roll(x, seed, axis=0) for seed in range(count)]), batch
      )
    self()

  def __call__(self) -> float:
    """Runs a few steps; returns the CPU seconds of one: on a quiet core, those of the clock."""
    start = time.process_time()
    for _ in range(STEPS):
      self._state, metrics = self._step(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return (time.process_time() - start) / STEPS


def measure(settings: ExperimentConfig, pairs: int) -> dict[str, dict[str, float]]:
  """Compares 2 and 3 seeds at once with one; returns the figures by the number of seeds."""
  one = Seeds(settings, 1)
  found = {}
  for count in SEEDS:
    several = Seeds(settings, count)
    times = common.compare(one, several, pairs)
    quartiles = sorted(count / ratio for ratio in times.quartiles)
    found[f"{count} seeds"] = {
        "one": one.tokens / times.first,
        "at_once": several.tokens / times.second,
        "ratio": count / times.ratio,
        "lower_quartile": quartiles[0],
        "upper_quartile": quartiles[1],
        "bar": BAR,
    }
  return found


def main(arguments: Sequence[str]) -> None:
  """Runs the benchmark on one core, and prints the table."""
  parser = common.parser(__doc__, "toy sizes, two pairs")
  options = parser.parse_args(arguments)
  # Before jax makes its threads.
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  print(f"float32, {common.hardware()}\n", flush=True)
  spec = str(common.ROOT / "experiments/evidence.py") + (":debug" if options.quick else "")
  rows = [["model", "seeds at once", "one, tokens/s", "at once", "ratio", "quartiles", "bar"]]
  results: dict[str, dict[str, float]] = {}
  for name, overrides in common.progress(list(MODELS.items()), "models"):
    vocabulary = {"model.vocab_size": "258" if options.quick else "2048"}
    settings = experiment.load(spec, [*overrides.items(), *vocabulary.items()])
    for seeds, each in measure(settings, 2 if options.quick else PAIRS).items():
      results[f"{name}, {seeds}"] = each
      rows.append([
          name, seeds, common.number(each["one"]), common.number(each["at_once"]),
          common.ratio(each["ratio"]),
          f"{each['lower_quartile']:.2f} to {each['upper_quartile']:.2f}", common.bar(BAR),
      ])
    if options.json:
      common.write_json(options.json, common.record(
          "seeds", arguments, "tokens/s on one core, all seeds together; ratio: at once over one "
          "after the other", results,
      ))
  print(Table("Tokens/s of a train step on one core", rows, results))


if __name__ == "__main__":
  main(sys.argv[1:])
