"""DenseRetNet 350M, the authors' smaller size (arXiv 2403.00818, table 2 and released code).

Command   python -m dense_jax.cli.train --config experiments/dense_retnet_350m.py \
              --workdir runs/dense_retnet_350m --config.data.path='pile/*.jsonl.zst' \
              --config.data.tokenizer=llama/tokenizer.model
Hardware  the train step fits a TPU v5e (16 GB) with 4 sequences per chip; for a pod, set
          --config.mesh.data and --config.mesh.fsdp
Size      367,630,080 parameters: D 1536, K 768, 2 heads, 16 layers, V 32000, untied head
Recipe    15B tokens of The Pile, length 2048, AdamW 6e-4, beta2 0.98, weight decay 0.01,
          warm-up 1.5 %, polynomial decay
Expected  not trained here
"""

from ml_collections import ConfigDict

from dense_jax.experiment import check_argument, default_config

TOKENS = 15_000_000_000


def get_config(arg: str = "") -> ConfigDict:
  """Returns the experiment; `:debug` shrinks it to a smoke test on Python's standard library."""
  config = default_config("gau_retnet")
  config.model.update(
      vocab_size=32000, width=1536, layers=16, tie_embeddings=False, norm_eps=1e-6,
      dtype="bfloat16", remat="full", block_layers=5,
  )
  config.model.mixer.update(heads=2, key_dim=768, expand=2)
  config.model.dense.update(depth=1, inject="inputs", gate_init="normal", input_norm=True)
  config.data.seq_len = 2048
  config.train.batch_size = 256
  config.train.steps = TOKENS // (config.train.batch_size * config.data.seq_len)
  config.train.update(eval_every=1000, checkpoint_every=1000, log_every=50)
  config.optimizer.update(
      learning_rate=6e-4, schedule="polynomial", warmup_fraction=0.015, final_fraction=0.0,
      beta2=0.98, weight_decay=0.01,
  )
  if check_argument(arg, "debug"):
    config.model.update(vocab_size=0, width=64, layers=4, block_layers=1, dtype="float32")
    config.model.mixer.key_dim = 32
    config.data.update(seq_len=64, tokenizer="bytes")
    config.train.update(steps=4, batch_size=4, log_every=1, eval_every=2, eval_batches=2,
                        checkpoint_every=2)
  return config
