"""The mean of a run's newest checkpoints."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dense_jax.config import invalid
from dense_jax.files import make_path
from dense_jax.models.params import with_params
from dense_jax.runs.restoring import Run, restore
from dense_jax.runs.workdir import CHECKPOINTS
from dense_jax.training.stored import saved_steps


def average_checkpoints(workdir: str | os.PathLike[str], count: int) -> tuple[Run, list[int]]:
  """Averages the trained parameters of a run's newest checkpoints, each with the same weight.

  The sums are made in float64 in the host's memory, and rounded once. One checkpoint at a time is
  read.

  Args:
    workdir: the folder that training wrote.
    count: the number of checkpoints, of those that the run kept (`train.keep_last` and, among
      them or older, `train.keep_best`).

  Returns:
    The run at its newest checkpoint with the mean as its parameters, and the steps, in order.

  Raises:
    InputError: the run has kept fewer checkpoints, or one of them cannot be read.
  """
  kept = saved_steps(make_path(os.fspath(workdir), "--workdir") / CHECKPOINTS)
  if count < 1 or (kept and count > len(kept)):
    raise invalid(
        "--average", count, f"an integer from 1 to {len(kept)}, the checkpoints that the run has "
        "kept (config.train.keep_last says how many it keeps)",
    )
  steps = kept[-count:]
  run = restore(workdir, str(steps[-1]) if steps else "latest", "raw", runs_model=False)
  sums = {name: np.asarray(leaf, np.float64) for name, leaf in run.params.items()}
  earlier = tqdm.tqdm(
      steps[:-1], desc="averaging", unit="checkpoint", leave=False,
      disable=not sys.stderr.isatty(),
  )
  for step in earlier:
    params = restore(workdir, str(step), "raw", runs_model=False).params
    for name in sums:
      sums[name] = sums[name] + np.asarray(params[name], np.float64)
  mean = {
      name: jax.device_put(jnp.asarray((total / count).astype(np.float32)))
      for name, total in sums.items()
  }
  name = f"the mean of steps {', '.join(map(str, steps))} of {os.fspath(workdir)}"
  model = with_params(run.model, mean)
  return Run(name, run.tokenizer, model, mean, run.config, run.step), steps
