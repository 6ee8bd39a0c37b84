"""mamba_ssm's operations (PyTorch; Triton and CUDA) on one GPU, forward and backward.

Install   mamba_ssm with its CUDA extension for "scan"; for "ssd" its Python files suffice, with an
          empty mamba_ssm/__init__.py on PYTHONPATH, and torch, triton and einops
Status    "ssd" was run on an H200 (experiments/results/gpu_layers_h200_2026-11-28.json)
Sizes     those of `gpu_rates.operation`: 16 rows of 2048 tokens, E 2048; "ssd" has 32 heads of P 64
          and N 128, chunks of 256; "scan" has N 16. bfloat16 inputs, float32 decays

Imports nothing of dense_jax. Prints its figures as JSON, or {"skipped": why}.
"""

import importlib
import json
import statistics
import sys
import time
from typing import Any

from experiments.benchmarks.fla_rival import fix_tuning

BATCH, TIME, HEADS, CHANNELS, SIZE, STATES = 16, 2048, 32, 64, 128, 16
REPEATS = 10


def ssd(torch: Any) -> tuple[Any, list[Any]]:
  """Returns Mamba-2's chunked operation and its inputs."""
  combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
  inputs = [
      torch.randn(BATCH, TIME, HEADS, CHANNELS, dtype=torch.bfloat16),
      torch.full((BATCH, TIME, HEADS), 0.1),
      -torch.ones(HEADS),
      torch.randn(BATCH, TIME, 1, SIZE, dtype=torch.bfloat16),
      torch.randn(BATCH, TIME, 1, SIZE, dtype=torch.bfloat16),
  ]
  return lambda *args: combined.mamba_chunk_scan_combined(*args, chunk_size=256), inputs


def scan(torch: Any) -> tuple[Any, list[Any]]:
  """Returns Mamba's selective scan and its inputs."""
  interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
  width = HEADS * CHANNELS
  decay = -(1.0 + torch.arange(STATES)).repeat(width, 1)
  inputs = [
      torch.randn(BATCH, width, TIME, dtype=torch.bfloat16),
      torch.full((BATCH, width, TIME), 0.01, dtype=torch.bfloat16),
      decay,
      torch.randn(BATCH, 1, STATES, TIME, dtype=torch.bfloat16),
      torch.randn(BATCH, 1, STATES, TIME, dtype=torch.bfloat16),
  ]
  return interface.selective_scan_fn, inputs


OPERATIONS = {"ssd": ssd, "scan": scan}


def main(name: str) -> None:
  """Measures an operation: "ssd" or "scan"."""
  try:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
      raise ImportError("torch finds no CUDA device")
    tuning = fix_tuning()
    with torch.device("cuda"):
      function, inputs = OPERATIONS[name](torch)
  except ImportError as error:
    print(json.dumps({"skipped": str(error)}))
    return
  inputs = [each.requires_grad_() for each in inputs]

  def run() -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.autograd.grad(function(*inputs).float().square().sum(), inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - start

  run(), run()
  print(json.dumps({
      "seconds": statistics.median(run() for _ in range(REPEATS)), "tuning": tuning,
      "device": torch.cuda.get_device_name(),
  }))


if __name__ == "__main__":
  main(sys.argv[1])
