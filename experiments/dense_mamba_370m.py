"""DenseMamba 370M: Mamba-370M's published shape with dense state connections of depth 2.

Command   python -m dense_jax.cli.train --config experiments/dense_mamba_370m.py \
              --workdir runs/dense_mamba_370m --config.data.path='pile/*.jsonl.zst' \
              --config.data.tokenizer=llama/tokenizer.model
Hardware  the train step is compiled for a TPU v5e 2x2 by a test
Size      376,136,704 parameters: D 1024, 48 layers, N 16, V 50280, tied head (arXiv
          2312.00752, table 12); every layer but the first also has a gate of rank D / 32 for
          its 2048 channels
Recipe    length 2048, 0.5M tokens a batch, AdamW 1.5e-3 with betas 0.9 and 0.95, weight
          decay 0.1, clipping at 1, cosine decay to 1e-5 (arXiv 2312.00752, section E.2)
Expected  not trained here
"""

from ml_collections import ConfigDict

from dense_jax.experiment import check_argument, default_config


def get_config(arg: str = "") -> ConfigDict:
  """Returns the experiment; `:debug` shrinks it to a smoke test on Python's standard library."""
  config = default_config("mamba")
  config.model.update(
      vocab_size=50280, width=1024, layers=48, dtype="bfloat16", remat="full", block_layers=9
  )
  config.model.dense.update(depth=2, inject="state")
  config.data.seq_len = 2048
  config.train.update(
      steps=13_500, batch_size=256, eval_every=1000, checkpoint_every=1000, log_every=50
  )
  config.optimizer.update(
      learning_rate=1.5e-3, warmup_fraction=0.1, final_fraction=1e-5 / 1.5e-3
  )
  if check_argument(arg, "debug"):
    config.model.update(vocab_size=0, width=32, layers=5, block_layers=2, dtype="float32")
    config.data.update(seq_len=64, tokenizer="bytes")
    config.train.update(steps=4, batch_size=4, log_every=1, eval_every=2, eval_batches=2,
                        checkpoint_every=2)
  return config
