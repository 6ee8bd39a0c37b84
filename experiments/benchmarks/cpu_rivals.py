"""Training and decoding beside PyTorch, in one run: the authors' code, and transformers' models.

Steps of ours and of the rival's alternate, two at a time, of which the second is timed; each
process waits while the other computes.
The rival has the same weights, and must have the same loss before anything is timed.
"""

import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from dense_jax.config import ExperimentConfig
from dense_jax.generation.programs import BLOCK
from dense_jax.models.language_model import LanguageModel
from dense_jax.ops.cross_entropy import token_cross_entropy
from experiments.benchmarks import common
from experiments.benchmarks.common import Decoding, Size, Table, TrainStep
from experiments.benchmarks.torch_client import Rivals, TorchRival, shown

# The authors' model: gau_retnet, D 512, K 256, 2 heads, 8 layers, V 8192, m = 1.
TRAIN_BARS = {2048: 1.2, 4096: 5.0}
DECODE_BARS = {1: 3.0, 6: 3.0}
LENGTHS, BATCHES = (2048, 4096, 8192), (1, 6)
# The longest rows whose scores of all pairs of tokens are made, by the rival and by our own form.
QUADRATIC = 4096
HF_FAMILIES, HF_LENGTH = ("mamba", "mamba2"), 512
_RATES = ["tokens/s", "PyTorch", "ratio", "quartiles"]


def authors_config(time_steps: int, *, quick: bool, **model: object) -> ExperimentConfig:
  """Makes the configuration of the authors' model for one sequence length."""
  width, layers = (64, 2) if quick else (512, 8)
  return common.config(
      "gau_retnet", Size(width, layers, 8192, 1, time_steps),
      mixer={"heads": 2, "key_dim": width // 2},
      dense={"depth": 1, "inject": "inputs", "gate_init": "normal"},
      tie_embeddings=False, norm_eps=1e-6, **model,
  )


@jax.jit
def _loss(model: LanguageModel, tokens_BT: jax.Array) -> jax.Array:
  """Returns the mean loss of the rows' tokens after the first, in nats."""
  logits_BTV = model(tokens_BT)[:, :-1]
  return jnp.mean(token_cross_entropy(logits_BTV, tokens_BT[:, 1:])[0])


def _settled(call: Callable[[], float]) -> Callable[[], float]:
  """Makes a call that runs twice and returns the second one's seconds.

  The first call after another process's finds its caches and pages gone, and takes up to twice as
  long (gau_retnet at T 4096); steps of training follow each other.
  """
  def run() -> float:
    call()
    return call()

  return run


def _training(step: TrainStep, rivals: Rivals, code: str, pairs: int) -> common.Compared:
  """Times a train step of ours and one of the rival's in turn."""
  model, batch = step.model(), step.batch
  with TorchRival(rivals, model, code=code) as rival:
    rival.trains_on(batch.tokens_BT, float(_loss(model, batch.tokens_BT)))
    return common.compare(_settled(step), _settled(rival.train), pairs)


def _decoding(decoding: Decoding, rivals: Rivals, code: str, pairs: int) -> common.Compared:
  """Times decoding of a block of ours and of the rival's in turn."""
  with TorchRival(rivals, decoding.model, code=code) as rival:
    prompts = [decoding.prompt] * decoding.batch_size
    return common.compare(
        _settled(decoding), _settled(lambda: rival.decode(prompts, BLOCK)), pairs
    )


def _figures(times: common.Compared | None, units: float, **more: float | None) -> dict[str, float]:
  """Returns the figures of a pair for the record."""
  if times is None:
    return common.figures(**more)
  lower, upper = times.quartiles
  return common.figures(
      **more, tokens_per_second=units / times.first, pytorch=units / times.second,
      over_pytorch=times.ratio, lower_quartile=lower, upper_quartile=upper,
  )


def authors_training(quick: bool, rivals: Rivals) -> Table:
  """Compares training (forward, backward and AdamW) by sequence length."""
  rows = [["T", *_RATES, "bar", "over our own quadratic form", "quartiles"]]
  results, code, pairs = {}, rivals.modelling_file(), 1 if quick else 5
  for length in common.progress((256,) if quick else LENGTHS, "authors, training"):
    ours = TrainStep(authors_config(length, quick=quick))
    times = quadratic = None
    alone = ours.tokens / common.median(ours, 1 if quick else 3)
    cells = [f"{alone:.0f}", "", "", ""]
    if length <= QUADRATIC:
      if code:
        times = _training(ours, rivals, code, pairs)
        cells = shown(times, ours.tokens)
      one_chunk = TrainStep(authors_config(length, quick=quick, chunk=length))
      quadratic = common.compare(ours, one_chunk, 1 if quick else 3)
    bar = None if quick or times is None else TRAIN_BARS.get(length)
    results[f"train {length}"] = _figures(
        times, ours.tokens, bar=bar, alone=alone,
        over_quadratic=quadratic.ratio if quadratic else None,
    )
    rows.append([f"{length}", *cells, common.bar(bar),
                 *([common.ratio(quadratic.ratio), quadratic.middle()] if quadratic else ["", ""])])
  return Table("gau_retnet as the authors train it", rows, results)


def authors_decoding(quick: bool, rivals: Rivals) -> Table:
  """Compares decoding by batch size, and decodes on to show that neither time nor memory grow."""
  new_tokens = 128 if quick else 10_000
  rows = [["B", *_RATES, "bar", f"last / first of {new_tokens}", "memory growth"]]
  results, code = {}, rivals.modelling_file()
  for size in common.progress(BATCHES[:1] if quick else BATCHES, "authors, decoding"):
    decoding = Decoding(authors_config(64, quick=quick), size)
    times = _decoding(decoding, rivals, code, 1 if quick else 15) if code else None
    first, last, growth = _decoded_on(decoding, new_tokens)
    bar = None if quick or times is None else DECODE_BARS[size]
    results[f"decode {size}"] = _figures(
        times, size, first=first, last=last, bar=bar, memory_growth=growth
    )
    cells = shown(times, size) if times else [f"{last:.0f}", "", "", ""]
    rows.append([f"{size}", *cells, common.bar(bar), f"{last / first:.2f}",
                 f"{growth / 2**20:.1f} MiB"])
  return Table("gau_retnet as the authors sample from it", rows, results)


def _decoded_on(decoding: Decoding, new_tokens: int) -> tuple[float, float, int]:
  """Decodes `new_tokens` tokens for each row.

  Returns:
    Tokens/s of all rows together at the beginning and at the end, and the growth of the
    process's memory in between, in bytes.
  """
  rates: list[float] = []
  before = common.resident_memory()
  while len(rates) * BLOCK < new_tokens:
    rates.append(decoding.batch_size / decoding())
    if len(rates) == 2:
      before = common.resident_memory()
  some = max(2, len(rates) // 10)
  growth = common.resident_memory() - before
  return statistics.median(rates[:some]), statistics.median(rates[-some:]), growth


def authors(quick: bool, rivals: Rivals) -> Iterator[Table]:
  """Yields both tables beside the authors' code."""
  yield authors_training(quick, rivals)
  yield authors_decoding(quick, rivals)


def transformers(quick: bool, rivals: Rivals) -> Iterator[Table]:
  """Compares mamba and mamba2 with transformers' classes, which run plain PyTorch on a CPU."""
  if not rivals.python:
    return
  size = Size(32, 2, 64, 1, 32) if quick else Size(512, 8, 8192, 1, HF_LENGTH)
  rows, results = [["what", *_RATES]], {}
  cases: list[tuple[str, str, int]] = []
  for family in HF_FAMILIES:
    cases.append((family, "train", size.time_steps))
    cases += [(family, "decode", batch) for batch in (BATCHES[:1] if quick else BATCHES)]
  for family, kind, number in common.progress(cases, "transformers"):
    settings = common.config(family, size)
    if kind == "train":
      step = TrainStep(settings)
      times, units = _training(step, rivals, "", 1 if quick else 5), step.tokens
    else:
      times, units = _decoding(Decoding(settings, number), rivals, "", 1 if quick else 9), number
    name = f"{family}, {kind}, {'T' if kind == 'train' else 'B'} {number}"
    results[name] = _figures(times, units)
    rows.append([name, *shown(times, units)])
  yield Table(f"Beside transformers, D {size.width}, {size.layers} layers", rows, results)
