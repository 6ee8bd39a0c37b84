"""A small DenseMamba, trained on the source code of Python's standard library.

Command   make train, or
          python -m dense_jax.cli.train --config experiments/smoke.py --workdir runs/smoke
Hardware  two CPU cores
Expected  see README.md
"""

from ml_collections import ConfigDict

from dense_jax.experiment import check_argument, default_config


def get_config(arg: str = "") -> ConfigDict:
  """Returns the experiment; `:debug` shrinks it to a few steps of a tiny model on bytes."""
  config = default_config("mamba")
  config.model.width = 192
  config.model.layers = 6
  config.model.dense.depth = 1
  config.model.mixer.state_size = 8
  config.data.seq_len = 256
  config.train.batch_size = 8
  config.train.steps = 350
  config.train.eval_every = 100
  config.train.checkpoint_every = 100
  config.train.log_every = 10
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_fraction = 0.1
  if check_argument(arg, "debug"):
    config.model.width = 32
    config.model.layers = 3
    config.data.seq_len = 64
    config.data.tokenizer = "bytes"
    config.train.update(steps=4, batch_size=4, log_every=1, eval_every=2, eval_batches=2,
                        checkpoint_every=2)
  return config
