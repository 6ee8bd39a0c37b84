"""DenseRetNet 1.3B, the authors' larger size (arXiv 2403.00818, table 2 and released code).

Command   python -m dense_jax.cli.train --config experiments/dense_retnet_1p3b.py \
              --workdir runs/dense_retnet_1p3b --config.data.path='pile/*.jsonl.zst' \
              --config.data.tokenizer=llama/tokenizer.model --config.mesh.fsdp=-1 \
              --config.mesh.data=1
Hardware  a TPU pod slice
Size      1,333,090,560 parameters: D 2560, K 1280, 4 heads, 25 layers, V 32000, untied head
Recipe    as dense_retnet_350m
Expected  not trained here
"""

import pathlib

from ml_collections import ConfigDict

from dense_jax import experiment


def get_config(arg: str = "") -> ConfigDict:
  """Returns the experiment; `:debug` shrinks it to a smoke test on Python's standard library."""
  smaller = pathlib.Path(__file__).with_name("dense_retnet_350m.py")
  config = experiment.get_config(smaller, arg)
  if not arg:
    config.model.update(width=2560, layers=25, block_layers=6)
    config.model.mixer.update(heads=4, key_dim=1280)
  return config
