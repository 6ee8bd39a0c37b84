"""All families at about 350M parameters, base or dense, as compared in the paper.

Command   python -m dense_jax.cli.train --config experiments/family_350m.py:mamba2 \
              --workdir runs/mamba2_350m --config.model.dense.depth=2 \
              --config.data.path='pile/*.jsonl.zst' \
              --config.data.tokenizer=llama/tokenizer.model
Hardware  every family's train step, base and dense, is compiled for a TPU v5e (16 GB) by a
          test: 4 sequences of 2048 tokens on one chip
Size      344M to 372M parameters; V 50280 and a tied head, except gau_retnet, which is as the
          authors train it (V 32000, untied)
Recipe    15B tokens, length 2048, 0.5M tokens per batch, AdamW 1e-3 with betas 0.9 and 0.95,
          weight decay 0.1, cosine decay to a tenth
Expected  not trained here
"""

from ml_collections import ConfigDict

from dense_jax.experiment import check_argument, default_config

TOKENS = 15_000_000_000
# Family -> D and the number of layers; other options are in MIXERS, or are the family's defaults.
SIZES = {
    "mamba": (1024, 48), "mamba2": (1024, 48), "s4": (1024, 28), "s4d": (1024, 28),
    "retnet": (1024, 24), "gau_retnet": (1536, 16), "transformer": (1024, 24),
}
MIXERS = {
    "retnet": {"heads": 4},
    "gau_retnet": {"heads": 2, "key_dim": 768},
    "transformer": {"heads": 16},
}


def get_config(arg: str = "") -> ConfigDict:
  """Returns the experiment of `:FAMILY` (default mamba2); `:FAMILY-debug` is a smoke test."""
  known = ["debug", *(name + ending for name in SIZES for ending in ("", "-debug"))]
  debug = check_argument(arg, *known).endswith("debug")
  family = arg.removesuffix("debug").removesuffix("-") or "mamba2"
  config = default_config(family)
  width, layers = SIZES[family]
  config.model.update(
      vocab_size=50280, width=width, layers=layers, dtype="bfloat16", remat="full",
      # Near sqrt(L), and such that few layers are left over at any m up to 3.
      block_layers={48: 5, 28: 5, 24: 7, 16: 7}[layers],
  )
  config.model.mixer.update(MIXERS.get(family, {}))
  if family == "gau_retnet":
    config.model.update(vocab_size=32000, tie_embeddings=False)
  config.data.seq_len = 2048
  config.train.batch_size = 256
  config.train.steps = TOKENS // (config.train.batch_size * config.data.seq_len)
  config.train.update(eval_every=1000, checkpoint_every=1000, log_every=50)
  config.optimizer.update(learning_rate=1e-3)
  if debug:
    config.model.update(vocab_size=0, width=64, layers=5, block_layers=2, dtype="float32")
    if "key_dim" in config.model.mixer:
      config.model.mixer.key_dim = 32
    config.data.update(seq_len=64, tokenizer="bytes")
    config.train.update(steps=4, batch_size=4, log_every=1, eval_every=2, eval_batches=2,
                        checkpoint_every=2)
  return config
