"""Agreement and speed beside lm-evaluation-harness with its Hugging Face back end, on a CPU.

Command   GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.benchmarks.harness \
              --data ../shared/data --json experiments/results/harness_DATE.json
          (needs pip install -e '.[eval,hf,interop]' transformers accelerate)
Models    a mamba and a mamba2 of D 256 and 4 layers with a byte-level BPE of 8,192 tokens, trained
          for some steps, written by save_hf and loaded by transformers in float32
Items     the first of LAMBADA, HellaSwag and ARC-Easy, and pages of WikiText-2's test split, with
          no example in the prompt and with five, which are the same in all prompts (the sampler
          first_n of the harness)
Rival     lm_eval's back end "hf" on the CPU: transformers has only its plain PyTorch code there.
          It runs with the batch size of `RIVAL_BATCHES` that is fastest on the first items
Table 1   the largest differences between our log-likelihoods and the rival's, and the metrics of
          both: ours are those of `cli.evaluate --tasks`; "adapter" is this project as the harness's
          back end `dense_jax`
Table 2   documents a second, tokenization included, with the same number of threads. Ours is the
          median of runs before and after the rival's, after one that compiles, whose time is given
          too
"""

import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm

from dense_jax import runs
from dense_jax.evaluation.harness_tasks import DEFINITIONS
from dense_jax.evaluation.likelihood import Likelihood
from dense_jax.evaluation.scoring import evaluate_task
from dense_jax.evaluation.task_data import TaskData, load_task
from dense_jax.formatting import markdown_table
from dense_jax.runs import harness
from experiments.benchmarks import common, harness_models

SHOTS = 5
# Task -> documents without examples in the prompt, and with them.
DOCUMENTS = {
    "lambada": (200, 200), "hellaswag": (100, 100), "arc_easy": (100, 100), "wikitext": (6, 0),
}
QUICK_DOCUMENTS = {"lambada": (3, 2), "arc_easy": (2, 2), "wikitext": (1, 0)}
RIVAL_BATCHES = (4, 16, 32)
# Documents on which the rival's batch sizes are tried.
TRIED = {"lambada": 16, "hellaswag": 8, "arc_easy": 8, "wikitext": 1}
BATCH_SIZE = 16
# Nats: absolute for a continuation; for a page of WikiText, relative to its own.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Size:
  """The size of the models, and how long they are trained."""

  width: int
  layers: int
  vocabulary: int
  steps: int


FULL = Size(256, 4, 8192, 40)
QUICK = Size(32, 2, 512, 2)


@dataclasses.dataclass(frozen=True)
class Scores:
  """The scores of a task's documents.

  Attributes:
    nats: the log-likelihood of each request, document by document.
    greedy: whether each is the greedy continuation; empty for pages.
    metrics: by name, as the harness calls them.
    seconds: how long the requests took, tokenization included.
  """

  nats: np.ndarray
  greedy: tuple[bool, ...]
  metrics: dict[str, float]
  seconds: float


class Timed:
  """Measures how long a model of the harness takes for requests."""

  def __init__(self, model: Any) -> None:
    """Wraps the model's methods in place."""
    self.model, self.seconds = model, 0.0
    for name in ("loglikelihood", "loglikelihood_rolling"):
      setattr(model, name, self._timed(getattr(model, name)))

  def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
      start = time.perf_counter()
      answers = call(*arguments, **options)
      self.seconds += time.perf_counter() - start
      return answers

    return run

  def __call__(self, task: str, data: str, documents: int, shots: int) -> Scores:
    """Evaluates a task by the harness."""
    self.seconds = 0.0
    results = harness.run_harness(
        self.model, [task], data=data, limit=documents, shots=shots, first_shots=True, samples=True
    )
    name = DEFINITIONS[task].name
    responses = [
        response[0] for sample in sorted(results["samples"][name], key=lambda s: s["doc_id"])
        for response in sample["resps"]
    ]
    metrics = {
        key.removesuffix(",none"): value for key, value in results["results"][name].items()
        if key.endswith(",none") and "_stderr" not in key
    }
    if task == "wikitext":
      return Scores(np.array(responses), (), metrics, self.seconds)
    nats, greedy = zip(*responses, strict=True)
    return Scores(np.array(nats), greedy, metrics, self.seconds)


def score(likelihood: Likelihood, data: TaskData) -> Scores:
  """Scores the items of a task as `cli.evaluate --tasks` does."""
  start = time.perf_counter()
  found = evaluate_task(likelihood, data)
  seconds = time.perf_counter() - start
  scored = [each for item in found.scored for each in item]
  greedy = () if data.task == "wikitext" else tuple(each.greedy for each in scored)
  nats = np.array([each.log_likelihood for each in scored])
  return Scores(nats, greedy, dict(found.metrics.values), seconds)


def make_models(folder: pathlib.Path, data: str, size: Size) -> dict[str, float]:
  """Writes a model of each family into a folder of its name; returns their last losses."""
  text = pathlib.Path(data, "text", "wikitext2_raw_valid.txt").read_text(encoding="utf-8")
  tokenizer = harness_models.train_tokenizer([text], size.vocabulary)
  ids = np.array(tokenizer.encode(text).ids, np.int32)
  losses = {}
  for family in harness_models.FAMILIES:
    settings = harness_models.settings(
        family, size.width, size.layers, tokenizer.get_vocab_size(), size.steps
    )
    with tqdm.tqdm(total=size.steps, desc=f"training {family}", disable=common.quiet()) as bar:
      losses[family] = harness_models.make_model(
          settings, ids, tokenizer, folder / family, bar.update
      )
  return losses


def make_rival(folder: pathlib.Path, threads: int) -> Any:
  """Loads a folder by the harness's Hugging Face back end."""
  import torch
  from lm_eval.models.huggingface import HFLM

  torch.set_num_threads(threads)
  return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def best_batch(rival: Timed, task: str, data: str, documents: int, shots: int) -> int:
  """Returns the batch size with which the rival is fastest."""
  seconds = {}
  for size in RIVAL_BATCHES:
    rival.model.batch_size_per_gpu = size
    seconds[size] = rival(task, data, min(TRIED[task], documents), shots).seconds
  return min(seconds, key=seconds.__getitem__)


def compare(
    adapter: Timed, rival: Timed, task: str, data: str, documents: int, shots: int
) -> dict[str, Any]:
  """Returns all figures of one task."""
  items = load_task(task, data, shots=shots, limit=documents)
  likelihood = adapter.model.answers.likelihood
  compiled = score(likelihood, items)
  batch_size = best_batch(rival, task, data, documents, shots)
  rival.model.batch_size_per_gpu = batch_size
  before = score(likelihood, items)
  theirs = rival(task, data, documents, shots)
  after = score(likelihood, items)
  through = adapter(task, data, documents, shots)
  seconds = statistics.median((before.seconds, after.seconds))

  def difference(scores: Scores) -> float:
    apart = np.abs(scores.nats - theirs.nats)
    return float((apart / np.abs(theirs.nats) if task == "wikitext" else apart).max())

  return {
      "documents": len(items.items),
      "requests": len(theirs.nats),
      "difference": difference(after),
      "adapter_difference": difference(through),
      "largest_nats": float(np.abs(theirs.nats).max()),
      "greedy_equal": after.greedy == theirs.greedy == through.greedy,
      "ours": {name: after.metrics[name] for name in theirs.metrics},
      "adapter": through.metrics,
      "rival": theirs.metrics,
      "rival_batch_size": batch_size,
      "rival_seconds": theirs.seconds,
      "ours_seconds": seconds,
      "ours_seconds_with_compilation": compiled.seconds,
      "adapter_seconds": through.seconds,
      "ratio": theirs.seconds / seconds,
  }


def agrees(figures: dict[str, Any]) -> bool:
  """Returns whether all log-likelihoods and accuracies are as they have to be."""
  accurate = all(
      figures[who][name] == value for name, value in figures["rival"].items()
      for who in ("ours", "adapter") if name.startswith("acc")
  )
  largest = max(figures["difference"], figures["adapter_difference"])
  return bool(accurate and figures["greedy_equal"] and largest <= TOLERANCE)


def agreement(results: dict[str, dict[str, Any]]) -> str:
  """Formats table 1."""
  header = ["model, task, shots", "documents", "requests", "difference", "of the adapter",
            "ours", "rival", "agree"]
  rows = [header]
  for name, found in results.items():
    def metrics(who: str, found: dict[str, Any] = found) -> str:
      return ", ".join(f"{key} {value:.4g}" for key, value in found[who].items())

    rows.append([
        name, str(found["documents"]), str(found["requests"]), f"{found['difference']:.1e}",
        f"{found['adapter_difference']:.1e}", metrics("ours"), metrics("rival"),
        "yes" if agrees(found) else "NO",
    ])
  return markdown_table(rows)


def speeds(results: dict[str, dict[str, Any]]) -> str:
  """Formats table 2."""
  rows = [["model, task, shots", "rival, documents/s", "its batch size", "ours, documents/s",
           "ratio", "ours with compilation", "the adapter"]]
  for name, found in results.items():
    def rate(key: str, found: dict[str, Any] = found) -> str:
      return f"{found['documents'] / found[key]:.3g}"

    rows.append([
        name, rate("rival_seconds"), str(found["rival_batch_size"]), rate("ours_seconds"),
        f"{found['ratio']:.1f}", rate("ours_seconds_with_compilation"), rate("adapter_seconds"),
    ])
  return markdown_table(rows)


def main(arguments: Sequence[str]) -> None:
  """Runs the benchmark, prints both tables, and fails if the two programs do not agree."""
  parser = common.parser(__doc__, "tiny models, few documents")
  parser.add_argument("--data", default="../shared/data", help="the folder of evaluation data, "
                      "with text/wikitext2_raw_valid.txt to train on (../shared/data)")
  parser.add_argument("--family", choices=harness_models.FAMILIES, help="one family only")
  options = parser.parse_args(arguments)
  size, documents = (QUICK, QUICK_DOCUMENTS) if options.quick else (FULL, DOCUMENTS)
  families = [options.family] if options.family else harness_models.FAMILIES
  threads = len(os.sched_getaffinity(0))
  results: dict[str, dict[str, Any]] = {}
  with tempfile.TemporaryDirectory() as temporary:
    losses = make_models(pathlib.Path(temporary), options.data, size)
    for family in families:
      folder = pathlib.Path(temporary, family)
      loaded = runs.load_folder(str(folder))
      adapter = Timed(harness.harness_model(loaded, batch_size=BATCH_SIZE, carried=False))
      rival = Timed(make_rival(folder, threads))
      cases = [
          (task, shots, counts[bool(shots)]) for shots in (0, SHOTS)
          for task, counts in documents.items() if counts[bool(shots)]
      ]
      for task, shots, count in common.progress(cases, family):
        results[f"{family}, {task}, {shots}"] = compare(
            adapter, rival, task, options.data, count, shots
        )
  note = (
      "difference: the largest between our log-likelihoods and the rival's, in nats; relative to "
      "the rival's for the pages of wikitext. ratio: the rival's seconds over ours"
  )
  print(f"{agreement(results)}\n\n{speeds(results)}")
  if options.json:
    common.write_json(options.json, common.record(
        "harness", arguments, note, results, threads=threads, losses=losses,
        model=dataclasses.asdict(size),
        rival=common.versions("lm_eval", "transformers", "torch", "tokenizers", "datasets"),
    ))
  if not all(agrees(found) for found in results.values()):
    sys.exit("error: the two programs do not agree")


if __name__ == "__main__":
  main(sys.argv[1:])
