"""The cost of dense connections, relative to the base model, in training and in decoding.

A decoding step reads every weight, and reads and writes every state; a dense layer also reads
the states of its sources. If memory bandwidth is the limit, the bytes predict the time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from dense_jax.config import ModelConfig
from dense_jax.models.params import abstract_model, get_params
from dense_jax.types import Array
from experiments.benchmarks import common
from experiments.benchmarks.common import SSM_FAMILIES, Decoding, Size, Table, TrainStep

FAMILIES = ("gau_retnet", "mamba2", "mamba")
# Column -> keys of config.model.dense.
KINDS: dict[str, dict[str, object]] = {
    "inputs, m = 1": {"depth": 1, "inject": "inputs"},
    "state, m = 2": {"depth": 2, "inject": "state"},
}
BATCHES = (1, 6)
# The weights are far larger than caches; one row's states are a tenth of them or less.
WIDTH, LAYERS, VOCABULARY, TIME_STEPS = 512, 8, 8192, 512
RIVAL, WINDOW = "transformer", 2048


@dataclasses.dataclass(frozen=True)
class StepBytes:
  """The least bytes that one step of decoding moves.

  Attributes:
    weights: bytes of weights, which are read once.
    states: bytes of all rows' states, which are read and written.
    shallow: bytes of shallower layers' states that dense layers read in addition.
  """

  weights: float
  states: float
  shallow: float

  def total(self) -> float:
    """Returns the sum of all reads and writes."""
    return self.weights + 2 * self.states + self.shallow


def step_bytes(config: ModelConfig, batch_size: int) -> StepBytes:
  """Computes the bytes that one step of decoding moves, from shapes alone."""
  model = abstract_model(config)
  weights = sum(leaf.size * leaf.dtype.itemsize for leaf in get_params(model).values())
  if not config.tie_embeddings:  # Only the tokens' rows of the embedding are read.
    weights -= 4 * config.vocab_size * config.width
  layers = jax.eval_shape(lambda: model.init_state(batch_size)).layers
  states = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
  reads = 0
  if config.dense.depth and config.dense.inject == "state":
    reads = sum(map(config.dense.sources, range(config.layers)))
  return StepBytes(weights, states, reads * states / config.layers)


def _size(quick: bool) -> Size:
  return Size(32, 3, 64, 1, 64) if quick else Size(WIDTH, LAYERS, VOCABULARY, 1, TIME_STEPS)


def _training(quick: bool) -> Table:
  size = _size(quick)
  rows = [["family", "dense", "base, ms", "dense, ms", "dense over base", "its range"]]
  results = {}
  for family in common.progress(FAMILIES[1:2] if quick else FAMILIES, "dense, training"):
    base = TrainStep(common.config(family, size))
    for kind, options in list(KINDS.items())[1 if quick else 0:]:
      dense = TrainStep(common.config(family, size, dense=options))
      times = common.compare(base, dense, 1 if quick else 5)
      results[f"train {family} {kind}"] = dataclasses.asdict(times)
      rows.append([family, kind, f"{1e3 * times.first:.0f}", f"{1e3 * times.second:.0f}",
                   common.ratio(times.ratio), times.range()])
  return Table(f"A step of training, dense over base, {size}", rows, results)


def _decoding(quick: bool) -> Table:
  size = _size(quick)
  rows = [["family", "dense", "B", "base, ms", "dense, ms", "dense over base", "its range",
           "by bytes", "deviation"]]
  results = {}
  families = FAMILIES[1:2] if quick else FAMILIES
  cases = [(family, batch) for family in families for batch in (BATCHES[1:] if quick else BATCHES)]
  for family, batch_size in common.progress(cases, "dense, decoding"):
    settings = common.config(family, size)
    base = Decoding(settings, batch_size)
    for kind, options in list(KINDS.items())[1 if quick else 0:]:
      dense_settings = common.config(family, size, dense=options)
      times = common.compare(base, Decoding(dense_settings, batch_size), 1 if quick else 31)
      moved = [step_bytes(each.model, batch_size) for each in (settings, dense_settings)]
      expected = moved[1].total() / moved[0].total()
      results[f"decode {family} {kind} B {batch_size}"] = {
          **dataclasses.asdict(times), "by_bytes": expected,
          "base_bytes": moved[0].total(), "dense_bytes": moved[1].total(),
      }
      rows.append([family, kind, f"{batch_size}", f"{1e3 * times.first:.2f}",
                   f"{1e3 * times.second:.2f}", common.ratio(times.ratio), times.range(),
                   common.ratio(expected), f"{100 * (times.ratio / expected - 1):+.0f}%"])
  return Table(f"A step of decoding, dense over base, {size.width} wide", rows, results)


def dense(quick: bool) -> Iterator[Table]:
  """Yields the table of training, then that of decoding."""
  yield _training(quick)
  yield _decoding(quick)


def decode(quick: bool) -> Iterator[Table]:
  """Compares decoding of every family with a transformer that has a window of WINDOW tokens."""
  size, window = _size(quick), 64 if quick else WINDOW
  rows = [["family", "B", "tokens/s", f"{RIVAL}, tokens/s", "ratio", "its range"]]
  results = {}
  for batch_size in common.progress(BATCHES[:1] if quick else BATCHES, "decode"):
    heads = {"heads": 4 if quick else 8, "context": window}
    rival = Decoding(common.config(RIVAL, size, mixer=heads), batch_size)
    for family in ("mamba",) if quick else SSM_FAMILIES:
      ours = Decoding(common.config(family, size), batch_size)
      times = common.compare(ours, rival, 1 if quick else 9)
      rates = batch_size / times.first, batch_size / times.second
      results[f"{family} B {batch_size}"] = common.figures(
          tokens_per_second=rates[0], rival=rates[1], ratio=times.ratio,
      )
      rows.append([family, f"{batch_size}", *map(common.number, rates),
                   common.ratio(times.ratio), times.range()])
  yield Table(
      f"Decoding beside a {RIVAL} of {window} tokens' window, {size.width} wide, "
      f"{size.layers} layers", rows, results,
  )


def bandwidth(quick: bool) -> Iterator[Table]:
  """Measures the memory bandwidth of products of B rows with weights, and of updating states."""
  kernel = jnp.ones((WIDTH, 2**10 if quick else 2**17))
  calls: dict[str, tuple[int, Callable[..., Array], Array]] = {
      f"weights, B {size}": (1, jnp.dot, jnp.ones((size, WIDTH))) for size in BATCHES
  }
  calls["states, read and written"] = 2, jnp.multiply, jnp.ones((1, 1))
  rows, results = [["what", "GB/s"]], {}
  for name, (passes, function, other) in calls.items():
    call = common.timed(functools.partial(jax.jit(function), other, kernel))
    call()
    rate = passes * kernel.nbytes / common.median(call, 1 if quick else 9) / 1e9
    results[name] = common.figures(gigabytes_per_second=rate)
    rows.append([name, f"{rate:.1f}"])
  yield Table(f"Bandwidth over {kernel.nbytes / 2**20:.0f} MiB", rows, results)
