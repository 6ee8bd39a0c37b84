"""Generation: memory for long prompts, drift of bfloat16 states, and rounding by batch size.

Command   python -m experiments.benchmarks.generation --text FILE \
              --json experiments/results/generation_DATE.json
Hardware  two cores, float32
Parts     memory  peak RSS, and seconds, of a process that reads a prompt of 1k, 10k and 100k tokens
                  and draws 16 more, beside one that reads nothing
          drift   tokens of a text, read one by one with states kept in float32 and in bfloat16:
                  mean |difference| of the negative log-likelihoods, in nats, and mean KL divergence
                  of the predictions, over all tokens and over the last tenth
          batches eight texts that are drawn at temperatures from 0.8 to 1.5 in batches of 1, 4 and
                  8 rows: how many of their tokens the batch size changes, and the largest
                  difference of log-probabilities
The models are small and fresh; `--workdir` names runs that are measured too, except for memory.
"""

import functools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dense_jax import experiment, runs
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.files import make_path
from dense_jax.generation.generator import Generator
from dense_jax.generation.requests import Request
from dense_jax.generation.sampling import Sampling
from dense_jax.models.language_model import LanguageModel, ModelState
from dense_jax.models.params import get_params, unrolled, with_params
from dense_jax.runs.generating import with_state_dtype
from dense_jax.runs.restoring import LoadedModel
from dense_jax.types import Array, Params
from experiments.benchmarks import common
from experiments.benchmarks.common import Table

DRIFT_FAMILIES = ("mamba", "gau_retnet", "mamba2", "retnet", "s4d")
FAMILIES = ("mamba", "gau_retnet")  # Of the other parts.
LENGTHS = (0, 1_000, 10_000, 100_000)
_MEMORY = "memory-of"  # The first argument of a process that is measured.


def small_model(family: str, *, quick: bool = False) -> LoadedModel:
  """Makes a fresh model of bytes with dense connections of depth 1."""
  config = experiment.default_config(family)
  config.model.update(vocab_size=258, width=64 if quick else 192, layers=2 if quick else 4)
  config.model.dense.depth = 1
  model = LanguageModel(experiment.resolve(config).model, rngs=nnx.Rngs(0))
  return LoadedModel(f"{family}, fresh", ByteTokenizer(), model, get_params(model))


def read_and_draw(family: str, length: int, quick: bool) -> None:
  """Reads a prompt and draws 16 tokens; prints peak RSS in bytes, and seconds."""
  generator = Generator(small_model(family, quick=quick).model, batch_size=1)
  ids = np.random.default_rng(0).integers(0, 256, length).tolist()
  # The programs are compiled before: their memory and time are those of any prompt.
  generator([Request([1] * 600, max_new_tokens=16)])
  start = time.perf_counter()
  if length:
    generator([Request(ids, max_new_tokens=16)])
  seconds = time.perf_counter() - start
  # Not ru_maxrss: a process inherits that of the one that started it.
  status = pathlib.Path("/proc/self/status").read_text()
  peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
  print(json.dumps([int(peak) * 1024, seconds]))


def memory(options: Any) -> Iterator[Table]:
  """Measures peak RSS by the prompt's length, each in a process of its own."""
  rows = [["family", *(f"{length:,} tokens" for length in LENGTHS), "100k - 1k", "tokens/s"]]
  results = {}
  for family in common.progress(FAMILIES[:1] if options.quick else FAMILIES, "memory"):
    peaks, seconds = [], 0.0
    for length in LENGTHS:
      done = subprocess.run(
          [sys.executable, "-m", "experiments.benchmarks.generation", _MEMORY, family, str(length),
           str(int(options.quick))], capture_output=True, text=True, check=True,
      )
      peak, seconds = json.loads(done.stdout)
      peaks.append(peak)
    results[family] = common.figures(
        **{f"peak_{length}": peak for length, peak in zip(LENGTHS, peaks, strict=True)},
        tokens_per_second=LENGTHS[-1] / seconds,
    )
    rows.append([
        family, *(f"{peak / 2**20:.0f} MiB" for peak in peaks),
        f"{(peaks[3] - peaks[1]) / 2**20:+.1f} MiB", f"{LENGTHS[-1] / seconds:,.0f}",
    ])
  yield Table("peak RSS by length of the prompt", rows, results)


def models(options: Any, families: Sequence[str], part: str) -> Iterator[LoadedModel]:
  """Yields a fresh model of each family, and the runs of --workdir, with a progress bar."""
  if options.quick:
    families = families[:1]
  makers: list[Callable[[], LoadedModel]] = [
      *(functools.partial(small_model, family, quick=options.quick) for family in families),
      *(functools.partial(runs.restore, workdir) for workdir in options.workdir),
  ]
  for make in common.progress(makers, part):
    yield make()


def drifts(model: LoadedModel, tokens_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Reads a text token by token with states kept in float32, and again in bfloat16.

  Returns:
    The negative log-likelihood of each token after the first in nats, its difference with states
    in bfloat16, and the KL divergence of the prediction then from that with states in float32.
  """
  exact = unrolled(model.model)
  rounded = unrolled(with_state_dtype(model, "bfloat16").model)

  @jax.jit
  def run(params: Params, tokens_T: Array) -> tuple[Array, Array, Array]:
    def body(
        states: tuple[ModelState, ModelState], pair: Array
    ) -> tuple[tuple[ModelState, ModelState], tuple[Array, Array, Array]]:
      state, logits_V = with_params(exact, params).step(states[0], pair[:1])
      other, other_V = with_params(rounded, params).step(states[1], pair[:1])
      log_V, other_log_V = jax.nn.log_softmax(logits_V[0]), jax.nn.log_softmax(other_V[0])
      kl = jnp.sum(jnp.exp(log_V) * (log_V - other_log_V))
      nll = -log_V[pair[1]]
      return (state, other), (nll, -other_log_V[pair[1]] - nll, kl)

    states = exact.init_state(1), rounded.init_state(1)
    return jax.lax.scan(body, states, jnp.stack([tokens_T[:-1], tokens_T[1:]], axis=1))[1]

  nll_T, change_T, kl_T = run(get_params(exact), jnp.asarray(tokens_T))
  return np.asarray(nll_T), np.asarray(change_T), np.asarray(kl_T)


def drift(options: Any) -> Iterator[Table]:
  """Measures what keeping states in bfloat16 changes."""
  length = 200 if options.quick else 10_000
  rows = [["model", "nats per token", "difference", "mean abs", "last tenth", "mean KL",
           "last tenth", "most"]]
  results = {}
  text = make_path(options.text, "--text").read_bytes()[: 16 * length].decode(errors="ignore")
  for model in models(options, DRIFT_FAMILIES, "drift"):
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)][: length + 1]
    nll, change, kl = drifts(model, np.asarray(ids, np.int32))
    tenth = slice(-len(nll) // 10, None)
    name = f"{model.name} ({model.model.config.family})"
    results[name] = common.figures(
        tokens=len(nll), nll=float(nll.mean()), difference=float(change.mean()),
        mean_abs=float(abs(change).mean()), mean_abs_last=float(abs(change[tenth]).mean()),
        kl=float(kl.mean()), kl_last=float(kl[tenth].mean()), most=float(abs(change).max()),
    )
    rows.append([
        name, f"{nll.mean():.4f}", f"{change.mean():+.1e}", f"{abs(change).mean():.1e}",
        f"{abs(change[tenth]).mean():.1e}", f"{kl.mean():.1e}", f"{kl[tenth].mean():.1e}",
        f"{abs(change).max():.1e}",
    ])
  yield Table(f"states in bfloat16 over {length:,} tokens", rows, results)


def batches(options: Any) -> Iterator[Table]:
  """Measures what the batch size changes in texts that are drawn."""
  length, sizes = 100 if options.quick else 2_000, (1, 4, 8)
  rows = [["model", "tokens", *(f"changed, {size} rows" for size in sizes[1:]),
           "log-probabilities"]]
  results = {}
  for model in models(options, FAMILIES, "batches"):
    requests = [
        Request([model.tokenizer.bos_id], Sampling(temperature), length, seed)
        for seed, temperature in enumerate((0.8, 1.0, 1.2, 1.5) * 2)
    ]
    alone, *others = (Generator(model.model, batch_size=size)(requests) for size in sizes)
    changed, difference = [], 0.0
    for other in others:
      same = 0
      for one, two in zip(alone, other, strict=True):
        pairs = list(zip(one.ids, two.ids, one.log_probs, two.log_probs, strict=True))
        # After one token that differs, the texts are two.
        first = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), length)
        same += first
        difference = max(difference, *(abs(pair[2] - pair[3]) for pair in pairs[:first]), 0.0)
      changed.append(length * len(requests) - same)
    name = f"{model.name} ({model.model.config.family})"
    total = length * len(requests)
    results[name] = common.figures(
        tokens=total, difference=difference,
        **{f"changed_{size}": count for size, count in zip(sizes[1:], changed, strict=True)},
    )
    rows.append([name, f"{total:,}", *(f"{count:,}" for count in changed), f"{difference:.1e}"])
  yield Table("tokens that another batch size changes", rows, results)


PARTS = {"memory": memory, "drift": drift, "batches": batches}


def main(arguments: Sequence[str]) -> None:
  """Runs the parts; prints and records each table when it is done."""
  if arguments[:1] == [_MEMORY]:
    read_and_draw(arguments[1], int(arguments[2]), bool(int(arguments[3])))
    return
  parser = common.parser(__doc__, "toy sizes")
  parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                      help=f"some of {', '.join(PARTS)} (all)")
  parser.add_argument("--text", required=True, metavar="FILE", help="the text for drift, UTF-8")
  parser.add_argument("--workdir", action="append", default=[], metavar="RUN",
                      help="a trained run to measure too; may be repeated")
  options = parser.parse_args(arguments)
  print(f"float32, {common.hardware()}\n", flush=True)
  results: dict[str, Any] = {}
  for name in options.only:
    for table in PARTS[name](options):
      print(table, flush=True)
      results.setdefault(name, {}).update(table.results)
      if options.json:
        common.write_json(options.json, common.record(
            "generation", arguments, "bytes, seconds, nats", results
        ))


if __name__ == "__main__":
  main(sys.argv[1:])
