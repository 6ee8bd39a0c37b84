"""State space models of about 1.3B parameters, base or dense: the larger published sizes.

Command   python -m dense_jax.cli.train --config experiments/family_1p3b.py:mamba2 \
              --workdir runs/mamba2_1p3b --config.model.dense.depth=1 \
              --config.data.path='pile/*.jsonl.zst' \
              --config.data.tokenizer=llama/tokenizer.model \
              --config.mesh.data=1 --config.mesh.fsdp=-1
Hardware  a TPU pod slice; `python -m experiments.benchmarks.tpu_matrix` says which ones it fits
Size      base parameters: mamba 1,372,178,432, mamba2 1,343,740,928, retnet 1,311,033,344.
          D 2048, 48 layers (retnet: 24, with heads of 256), V 50280, tied head. For the authors'
          DenseRetNet, see dense_retnet_1p3b.py
Recipe    as family_350m, with half its learning rate
Expected  not trained here
"""

import pathlib

from ml_collections import ConfigDict

from dense_jax import experiment

FAMILIES = ("mamba", "mamba2", "retnet")


def get_config(arg: str = "") -> ConfigDict:
  """Returns the experiment of `:FAMILY` (default mamba2); `:FAMILY-debug` is a smoke test."""
  known = ["debug", *(name + ending for name in FAMILIES for ending in ("", "-debug"))]
  debug = experiment.check_argument(arg, *known).endswith("debug")
  smaller = pathlib.Path(__file__).with_name("family_350m.py")
  config = experiment.get_config(smaller, arg)
  config.optimizer.learning_rate /= 2
  if not debug:
    config.model.width = 2048
    if config.model.family == "retnet":
      config.model.mixer.heads = 8
  return config
