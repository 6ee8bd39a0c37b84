"""A small model, 1 to 5M parameters, that the sweeps of `experiments/sweeps/` change.

Command   dense-jax sweep experiments/sweeps/sources.py --workdir runs/sweeps/sources --jobs 2
Hardware  two CPU cores: a run takes minutes
Size      gau_retnet, 1.18M parameters: 8 layers of 128 channels
Recipe    1.2M tokens in rows of 256, two rows a step, AdamW 1e-2 with a cosine; scored at its end
Expected  docs/evidence.md

`:25m` is the same question at 26.2M parameters on one GPU (experiments/sweeps/gpu.py): 12 layers of
512 channels, bfloat16, 24M tokens in rows of 1024, 16 rows a step, AdamW 2e-3.
"""

from ml_collections import ConfigDict

from dense_jax.experiment import check_argument, default_config

TOKENS_25M = 24_000_000


def get_config(arg: str = "") -> ConfigDict:
  """Returns the experiment; `:debug` or `:25m-debug` is a few steps of a tiny model on bytes."""
  size = check_argument(arg, "debug", "25m", "25m-debug")
  config = default_config("gau_retnet")
  config.model.width = 128
  config.model.layers = 8
  config.data.seq_len = 256
  config.data.vocab_size = 2048
  # Of batches of 1, 2, 4 and 8 rows and rates of 3e-3 to 1.6e-2, tried on the base model and one
  # seed: so few tokens want many small steps (loss 4.84; 5.62 with 8 rows and 3e-3).
  config.train.update(batch_size=2, steps=2400, eval_every=10**6, checkpoint_every=10**6,
                      keep_last=1, keep_best=0, eval_batches=256, log_every=100)
  config.optimizer.learning_rate = 1e-2
  config.optimizer.warmup_fraction = 0.1
  if size.startswith("25m"):
    config.model.update(width=512, layers=12, dtype="bfloat16")
    config.data.update(seq_len=1024, vocab_size=8192)
    config.train.update(batch_size=16, steps=TOKENS_25M // (16 * 1024), eval_batches=0)
    config.optimizer.learning_rate = 2e-3  # Not tried: no GPU was there to look for a better one.
  if size.endswith("debug"):
    config.model.update(width=32, dtype="float32")
    config.data.update(seq_len=32, tokenizer="bytes")
    config.train.update(steps=3, batch_size=2, log_every=1, eval_batches=2)
  return config
