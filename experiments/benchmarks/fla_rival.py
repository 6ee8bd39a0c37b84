r"""Training steps of flash-linear-attention's models (PyTorch and Triton) on one GPU.

Install   pip install flash-linear-attention mamba-ssm causal-conv1d, with a torch for CUDA, in
          this environment or another one:
          python -m experiments.benchmarks.gpu --fla-python OTHER/bin/python
          Without mamba-ssm and causal-conv1d its Mamba falls back to a loop over
          tokens and its Mamba-2 to plain PyTorch, which are no rivals: both are then skipped
Status    not measured. On an H200, with fixed tuning, a configuration of retention with 3 stages
          asked for more shared memory than there is (now it is one with 2), and Mamba-2 lacked
          causal-conv1d (now it is skipped). The numbers of parameters are those of
          experiments/family_350m.py: equal for mamba and mamba2, 0.2% more for retnet, whose
          feed-forward layer is gated there

A step is the model's forward and backward pass under bf16 autocast, with its own chunked
cross-entropy, and a fused AdamW on float32 parameters. Imports nothing of dense_jax, so that it
runs in an environment without jax. Prints its figures as JSON, or {"skipped": why} if something
is missing.
"""

import contextlib
import importlib
import importlib.util
import json
import statistics
import sys
import time
from typing import Any

REPEATS = 5
# Family -> prefix of its classes, and their arguments in addition to those of all families.
FAMILIES: dict[str, tuple[str, dict[str, int]]] = {
    # 1376: a gated layer has three matrices in place of our two; rounded to a multiple of 32.
    "retnet": ("RetNet", {"num_hidden_layers": 24, "num_heads": 4, "intermediate_size": 1376}),
    "mamba": ("Mamba", {"num_hidden_layers": 48, "state_size": 16}),
    "mamba2": ("Mamba2", {"num_hidden_layers": 48, "state_size": 128, "head_dim": 64}),
}
WIDTH, VOCABULARY = 1024, 50280


def fix_tuning() -> str:
  """Keeps one configuration of each Triton kernel, because tuning all of them takes minutes.

  Call it before kernels are defined. It may cost speed: kernels whose best configuration is
  another one run slower than tuned.

  Returns:
    What was kept, for the record.

  Raises:
    ImportError: triton is not installed.
  """
  tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
  make = tuner.__init__

  def keep_one(self: Any, *arguments: Any, **options: Any) -> None:
    make(self, *arguments, **options)
    self.configs = [min(
        self.configs, key=lambda each: (abs(each.num_warps - 4), abs(each.num_stages - 2))
    )]

  tuner.__init__ = keep_one
  return "one configuration a kernel: nearest to 4 warps and 2 stages, not tuned"


def missing(family: str) -> str:
  """Returns what a family needs and this environment lacks, for a message; "" if nothing."""
  for name in ("torch", "fla", "transformers"):
    if importlib.util.find_spec(name) is None:
      return f"{name} is not installed"
  if not importlib.import_module("torch").cuda.is_available():
    return "torch finds no CUDA device"
  if family == "retnet":
    return ""
  if importlib.util.find_spec("causal_conv1d") is None:
    return f"{family} has no kernels without mamba-ssm and causal-conv1d"
  fast = importlib.import_module(f"fla.layers.{family}").is_fast_path_available
  return "" if fast else f"{family} has no kernels without mamba-ssm and causal-conv1d"


def make_model(family: str) -> Any:
  """Makes a family's model of about 350M parameters, on torch's default device."""
  models = importlib.import_module("fla.models")
  prefix, options = FAMILIES[family]
  config = getattr(models, f"{prefix}Config")(
      vocab_size=VOCABULARY, hidden_size=WIDTH, tie_word_embeddings=True, use_cache=False,
      fuse_cross_entropy=False, fuse_linear_cross_entropy=True, **options,
  )
  return getattr(models, f"{prefix}ForCausalLM")(config)


def measure(family: str, batch_size: int, length: int, *, checkpoint: bool) -> dict[str, Any]:
  """Measures tokens/s and peak memory, in bytes, of training.

  Args:
    family: a key of FAMILIES.
    batch_size: rows per batch.
    length: tokens per row.
    checkpoint: whether layers are rematerialised.
  """
  torch = importlib.import_module("torch")
  torch.manual_seed(0)
  with torch.device("cuda"):
    model = make_model(family)
    tokens = torch.randint(0, VOCABULARY, (batch_size, length))
  model.train()
  if checkpoint:
    model.gradient_checkpointing_enable()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

  def step() -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
      loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  for _ in range(2):  # The first step tunes the kernels.
    step()
  torch.cuda.synchronize()
  times = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
  return {
      "tokens_per_second": batch_size * length / statistics.median(times),
      "peak_bytes": torch.cuda.max_memory_allocated(),
      "parameters": sum(parameter.numel() for parameter in model.parameters()),
  }


def main(family: str, batch_size: int, length: int, *, tuned: bool) -> None:
  """Measures a family, with rematerialisation only if the memory is too small without it.

  Args:
    family: a key of FAMILIES.
    batch_size: rows per batch.
    length: tokens per row.
    tuned: whether each kernel is tuned, which takes minutes; see `fix_tuning`.
  """
  tuning = "tuned"
  if not tuned and importlib.util.find_spec("triton") is not None:
    tuning = fix_tuning()
  reason = missing(family)
  if reason:
    print(json.dumps({"skipped": reason}))
    return
  torch = importlib.import_module("torch")
  figures: dict[str, Any] | None = None
  with contextlib.suppress(torch.cuda.OutOfMemoryError):
    figures = {**measure(family, batch_size, length, checkpoint=False), "remat": "none"}
  if figures is None:  # The failed attempt's memory is free only after the `with` block.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    figures = {**measure(family, batch_size, length, checkpoint=True), "remat": "full"}
  versions = {name: str(importlib.import_module(name).__version__) for name in ("torch", "fla")}
  print(json.dumps({
      **figures, "tuning": tuning, "versions": versions, "device": torch.cuda.get_device_name(),
  }))


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), tuned=sys.argv[4] == "tuned")
