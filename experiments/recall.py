"""Small models on synthetic tasks, which `experiments/sweeps/recall.py` changes.

Command   dense-jax train --config experiments/recall.py:mqar --workdir runs/mqar
Hardware  two CPU cores: a run takes minutes
Size      gau_retnet, 0.12M parameters with the vocabulary of mqar: 4 layers of 64 channels
Recipe    600 to 2400 steps of 32 or 64 rows, AdamW 3e-3 with a cosine; scored at the end
Expected  docs/long_range.md
"""

from typing import Any

from ml_collections import ConfigDict

from dense_jax.experiment import check_argument, default_config

# Task -> its keys, the length of rows, the rows of a step and the steps; further lengths are scored
# at the end.
TASKS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "mqar": ({"vocab_size": 64, "size": 4, "eval_lengths": "48,96,192"}, 24, 64, 2400),
    "copying": ({"size": 8, "eval_lengths": "256"}, 64, 64, 800),
    "induction": ({"eval_lengths": "128,256,512"}, 64, 64, 800),
    # Each depth at each length is scored, so that there are fewer rows than usual.
    "passkey": ({"heldout": 256, "eval_lengths": "128,256,512", "eval_depths": "0,0.5,1"},
                64, 32, 800),
    "listops": ({"size": 5, "depth": 5, "eval_lengths": "128,256"}, 64, 32, 600),
    "parity": ({"eval_lengths": "64,128"}, 32, 64, 800),
    "dyck": ({"eval_lengths": "128,256"}, 64, 64, 800),
}


def get_config(arg: str = "") -> ConfigDict:
  """Returns the experiment of a task, mqar if none is named; `:debug` shrinks it to a few steps.

  Several words are joined by a hyphen: `:passkey-debug`.
  """
  names = ["debug", *TASKS, *(f"{name}-debug" for name in TASKS)]
  name, _, debug = check_argument(arg, *names).partition("-")
  if name == "debug":
    name, debug = "", name
  config = default_config("gau_retnet")
  config.model.width = 64
  config.model.layers = 4
  name = name or "mqar"
  keys, config.data.seq_len, rows, steps = TASKS[name]
  config.data.task.update(name=name, **keys)
  config.train.update(batch_size=rows, steps=steps, eval_every=10**6, checkpoint_every=10**6,
                      keep_last=1, keep_best=0, eval_batches=0, log_every=100)
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_fraction = 0.1
  if debug:
    config.model.update(width=16)
    config.data.task.update(heldout=8, eval_lengths="80", eval_depths="")
    config.train.update(steps=3, batch_size=2, log_every=1)
  return config
