"""Training and decoding speed of a small gau_retnet on a CPU.

Command   GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/benchmarks/cpu.py
Model     D 512, K 256, 2 heads, 8 layers, V 8192, dense inputs m = 1, B 1, float32
Rival     in the same run: the same model with the whole sequence as one chunk, the
          quadratic form in which the released code trains; and the figures of the authors'
          PyTorch code on two cores of such a machine (419 / 255 training tokens/s at T 2048
          / 4096; 89 and 278 decoded tokens/s at B 1 and 6), which are constants here
"""

import argparse
import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dense_jax import experiment, sharding
from dense_jax.cli.common import table
from dense_jax.config import ExperimentConfig
from dense_jax.generation.decode import Generator
from dense_jax.generation.sampling import Sampling
from dense_jax.models.params import with_params
from dense_jax.training.step import Trainer
from dense_jax.types import Batch, Segments

PYTORCH_TRAIN = {2048: 419.0, 4096: 255.0}
PYTORCH_DECODE = {1: 89.0, 6: 278.0}


def config(time_steps: int, **model: object) -> ExperimentConfig:
  """The benchmark's model at one length."""
  values = experiment.default_config("gau_retnet")
  values.model.update(
      vocab_size=8192, width=512, layers=8, tie_embeddings=False, norm_eps=1e-6, **model
  )
  values.model.mixer.update(heads=2, key_dim=256)
  values.model.dense.update(depth=1, inject="inputs", gate_init="normal")
  values.data.seq_len = time_steps
  values.train.update(batch_size=1, steps=100)
  return experiment.resolve(values)


def seconds(call: Callable[[], object], repeats: int) -> float:
  """Median time of a call, after one to warm up."""
  jax.block_until_ready(call())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def training(settings: ExperimentConfig, repeats: int) -> float:
  """Training tokens/s: forward, backward and AdamW."""
  trainer = Trainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
  length = settings.data.seq_len
  # Any: host arrays stand where the dataclasses are annotated with jax's.
  tokens: Any = np.random.default_rng(0).integers(0, 8192, (1, length + 1)).astype(np.int32)
  positions: Any = np.arange(length, dtype=np.int32)[None]
  ones: Any = np.ones((1, length), bool)
  batch = trainer.put(
      Batch(
          tokens[:, :-1], tokens[:, 1:], ones, Segments(positions, ones.astype(np.int32)),
      )
  )
  state = trainer.init(0)

  def step() -> object:
    nonlocal state
    state, metrics = trainer.train_step(state, batch)
    return metrics

  return length / seconds(step, repeats)


def decoding(batch_size: int, new_tokens: int) -> tuple[float, float, int]:
  """Decoded tokens/s of all rows near the first and the last of `new_tokens`.

  Also the bytes by which the process's memory grew between the two.
  """
  settings = config(64)
  trainer = Trainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
  model = with_params(trainer.model, trainer.init(0).params)
  generator = Generator(model, Sampling(temperature=0))
  stream = generator.stream([[1, 2, 3]] * batch_size, seed=0)
  next(stream)  # Compiles.
  rates: list[float] = []
  before = memory()
  while len(rates) * 64 < new_tokens:
    start = time.perf_counter()
    tokens = next(stream)
    rates.append(tokens.size / (time.perf_counter() - start))
    if len(rates) == 2:
      before = memory()
  some = max(2, len(rates) // 10)
  return statistics.median(rates[:some]), statistics.median(rates[-some:]), memory() - before


def memory() -> int:
  """The process's resident bytes now."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--quick", action="store_true", help="short lengths: a smoke test")
  parser.add_argument("--json", default="", metavar="FILE", help="write the figures there")
  options = parser.parse_args()
  lengths = (256,) if options.quick else (2048, 4096, 8192)
  repeats = 1 if options.quick else 3
  results: dict[str, dict[str, float]] = {}

  rows = [("training, T", "chunked", "quadratic", "ratio", "PyTorch", "ratio")]
  for length in lengths:
    ours = training(config(length), repeats)
    # The quadratic form of 8192 tokens does not repay its minutes.
    rival = training(config(length, chunk=length), repeats) if length <= 4096 else float("nan")
    torch = PYTORCH_TRAIN.get(length, float("nan"))
    rates = {"chunked": ours, "quadratic": rival, "pytorch": torch}
    results[f"train {length}"] = {name: rate for name, rate in rates.items() if rate == rate}
    rows.append((f"{length}", f"{ours:.0f}", f"{rival:.0f}", f"{ours / rival:.2f}",
                 f"{torch:.0f}", f"{ours / torch:.2f}"))
  print(table(rows), flush=True)

  new_tokens = 128 if options.quick else 10_000
  decode_rows = [("decoding, B", "first tokens", f"to {new_tokens}", "last / first", "PyTorch",
                  "ratio", "memory growth")]
  for batch_size in (1, 6):
    first, last, growth = decoding(batch_size, new_tokens)
    torch = PYTORCH_DECODE[batch_size]
    results[f"decode {batch_size}"] = {
        "first": first, "last": last, "pytorch": torch, "memory_growth": growth
    }
    decode_rows.append((f"{batch_size}", f"{first:.0f}", f"{last:.0f}", f"{last / first:.2f}",
                        f"{torch:.0f}", f"{last / torch:.2f}", f"{growth / 2**20:.1f} MiB"))
  print("\n" + table(decode_rows))
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  main()
