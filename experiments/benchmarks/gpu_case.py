"""Runs one case of `experiments.benchmarks.gpu`, in a separate process to measure its peak memory.

The argument is a `Case` as JSON; the last line of output is the figures as JSON.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from dense_jax import experiment
from dense_jax.config import ExperimentConfig, ModelConfig
from dense_jax.costs.chips import find_chip
from dense_jax.models.flops import train_flops
from dense_jax.models.registry import FAMILIES
from dense_jax.ops import resolver
from experiments.benchmarks import common, gpu_layer, gpu_rates, kernel_times

TRAIN_REPEATS, DECODE_REPEATS = 5, 9


@dataclasses.dataclass(frozen=True)
class Case:
  """A case to measure.

  Attributes:
    kind: "train" or "decode"; "check" or "layer" of a family; "rates"; "operation".
    spec: the experiment, FILE.py[:ARG]; the name of a family or an operation.
    overrides: dotted keys of its configuration and their values.
    remat: values of `model.remat` to try in turn, until one fits the memory.
    batch_size: B of "decode"; that of "train" is among the overrides.
    context: tokens before the decoded ones.
    sources: shallow sources of "layer".
    toy: whether another case than "train" and "decode" has the sizes of a smoke test.
    compile_only: whether "train" ends after compilation, for the folder of compiled programs.
  """

  kind: str
  spec: str
  overrides: dict[str, str] = dataclasses.field(default_factory=dict)
  remat: tuple[str, ...] = ("none",)
  batch_size: int = 1
  context: int = 3
  sources: int = 0
  toy: bool = False
  compile_only: bool = False


def out_of_memory(error: Exception) -> bool:
  """Returns whether a computation failed because memory ran out."""
  return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def peak_memory(device: jax.Device) -> float | None:
  """Returns this process's peak memory on the device in bytes; None means it is not reported."""
  statistics = device.memory_stats()
  return statistics and statistics.get("peak_bytes_in_use")


def utilization(
    config: ModelConfig, seq_len: int, tokens_per_second: float, device_kind: str
) -> float | None:
  """Returns the MFU in bf16 on one device; None means that the device's peak is not known.

  Args:
    config: the model.
    seq_len: the tokens of a row.
    tokens_per_second: the measured speed of training.
    device_kind: jax's name of the device, such as "NVIDIA H200".
  """
  chip = find_chip(device_kind)
  return train_flops(config, seq_len) * tokens_per_second / chip.flops if chip else None


def train(settings: ExperimentConfig) -> dict[str, Any]:
  """Measures tokens/s, MFU and peak memory of training, and the seconds up to the second step.

  A further step is traced: `kernels` are the milliseconds of the largest kinds of GPU kernels.
  """
  device = jax.devices()[0]
  start = time.perf_counter()
  step = common.TrainStep(settings)
  compile_seconds = time.perf_counter() - start
  rate = step.tokens / common.median(step, TRAIN_REPEATS)
  peak = peak_memory(device)
  return {
      "tokens_per_second": rate,
      "mfu": utilization(settings.model, settings.data.seq_len, rate, device.device_kind),
      "flops_per_token": train_flops(settings.model, settings.data.seq_len),
      "peak_bytes": peak,
      "parameters": step.parameters,
      "compile_seconds": compile_seconds,
      **kernel_times.trace(step),
  }


def compile_step(settings: ExperimentConfig) -> dict[str, Any]:
  """Compiles what `train` runs, and runs no step, which needs most memory; returns the seconds."""
  start = time.perf_counter()
  trainer = common.make_trainer(settings)
  trainer.compile(trainer.init(0), trainer.put(common.batch(settings, documents=1)))
  return {"compile_seconds": time.perf_counter() - start}


def decode(settings: ExperimentConfig, batch_size: int, context: int) -> dict[str, Any]:
  """Measures tokens/s and seconds per step of decoding after `context` tokens, and peak memory."""
  step = common.Decoding(settings, batch_size, context=context)
  seconds = common.median(step, DECODE_REPEATS)
  return {
      "tokens_per_second": batch_size / seconds,
      "step_seconds": seconds,
      "peak_bytes": peak_memory(jax.devices()[0]),
      "parameters": step.parameters,
  }


def run(case: Case) -> dict[str, Any]:
  """Measures a case; training uses the first `remat` that fits.

  Returns:
    The figures; {"skipped": why} if the implementation would not run as itself on this machine.

  Raises:
    InputError: the experiment has no such form.
  """
  match case.kind:
    case "check":
      return {"errors": gpu_layer.errors(case.spec, toy=case.toy)}
    case "layer":
      return gpu_layer.times(case.spec, case.sources, toy=case.toy)
    case "rates":
      return gpu_rates.rates(toy=case.toy)
    case "operation":
      return gpu_rates.operation(case.spec, toy=case.toy)

  def settings(remat: str) -> ExperimentConfig:
    overrides = {**case.overrides, "model.remat": remat}
    return experiment.load(str(common.ROOT / case.spec), list(overrides.items()))

  model = settings(case.remat[0]).model
  chosen = resolver.resolve(FAMILIES[model.family].form, model.implementation)
  if model.implementation not in ("auto", chosen):  # For example, a kernel for TPUs.
    return {"skipped": f"runs as {chosen} here"}
  if case.kind == "decode":
    return decode(settings(case.remat[0]), case.batch_size, case.context)
  if case.compile_only:
    return compile_step(settings(case.remat[0]))
  return first_that_fits(case.remat, lambda remat: train(settings(remat)))


def first_that_fits(
    remats: tuple[str, ...], measure: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
  """Returns the figures of the first of `remats` that fits the memory, and which one that is."""
  for remat in remats:
    try:
      return {**measure(remat), "remat": remat}
    except Exception as error:
      if remat == remats[-1] or not out_of_memory(error):
        raise
      jax.clear_caches()
  raise ValueError("no remat to try")


def main(argument: str) -> None:
  """Measures the case given as JSON, and prints its figures as JSON."""
  values = json.loads(argument)
  case = Case(**{**values, "remat": tuple(values["remat"])})
  figures = run(case)
  print(json.dumps({**figures, "device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
  main(sys.argv[1])
