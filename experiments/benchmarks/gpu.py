"""Speed and memory on one NVIDIA H100 or H200, beside flash-linear-attention's models.

Command   python -m experiments.benchmarks.gpu --json experiments/results/gpu_DATE.json
          With --budget-seconds 570 no case starts after that time; run the same command again
          for the cases that FILE does not have yet. --only train/mamba decode selects cases
          --plan short is what 15 minutes on a card can tell: first the kernels against their
          specification. --prices FILE (of `prices`) adds the estimates to the measured steps.
          --side-by-side 12 first compiles that many cases at a time, where cores are many, and
          keeps the programs for the measurements, which follow one by one
Install   pip install 'jax[cuda12]'; for the rivals see fla_rival.py
Status    training was measured on an H200 (experiments/results/gpu_h200_2026-11-28.json), and XLA's
          forms and decoding of one row on an H100 (gpu_2026-11-26.json); the rivals, modes and
          long contexts were not.
          `--toy` runs all of it at toy size on a CPU, where nothing has a peak or an MFU and the
          rivals are skipped
Models    experiments/family_350m.py, 344M to 372M parameters, and dense_retnet_1p3b.py; bf16
          activations, float32 parameters and AdamW; V and head as there
Cases     check    a layer's kernels against the specification, at the layer's sizes (gpu_layer.py)
          rates    the card's matmul FLOP/s and copied bytes/s
          layer    a layer's recurrence with 0 and 2 sources, kernel by kernel
          train    tokens/s, MFU (models/flops.py) and peak memory of a train step, base and dense,
                   with 32768 tokens a batch and the first of remat minimal, reads, full that fits
          rival    the same of flash-linear-attention, at the same batch and length
          mode     the implementations of a form against each other, T 8192
          decode   decoded tokens/s of B rows
          context  decoded tokens/s of one row after 1k and 100k tokens
          operation  a recurrence, forward and backward, beside mamba_ssm's (op_rival.py)
Each case runs in a process of its own, so that its peak memory is its own, and a failure costs
one line. The most important cases come first, and FILE is written after each.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dense_jax.models.registry import FAMILIES
from dense_jax.ops import resolver
from experiments.benchmarks import common, fla_rival
from experiments.benchmarks.gpu_case import Case
from experiments.benchmarks.gpu_tables import tables

TIMED_FAMILIES = ("gau_retnet", "mamba2", "retnet", "mamba")
CHECKED_FAMILIES = ("mamba2", "gau_retnet", "retnet", "mamba")
LARGE = "gau_retnet-1.3B"
# Models whose cases rank one lower than those of the others.
LATER = ("mamba", LARGE)
# Lines of a failed case's errors that are printed.
TOLD = 12
Results = dict[str, Any]
# Name -> overrides.
DENSE: dict[str, dict[str, str]] = {
    "base": {"model.dense.depth": "0"},
    "state-1": {"model.dense.depth": "1", "model.dense.inject": "state"},
    "state-2": {"model.dense.depth": "2", "model.dense.inject": "state"},
    "inputs-1": {"model.dense.depth": "1", "model.dense.inject": "inputs"},
}
REMAT = ("minimal", "reads", "full")


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a run's cases.

  Attributes:
    lengths: T of `train` and `rival`, the most important first.
    tokens: tokens per batch of training.
    mode_length: T of `mode`.
    batches: B of `decode`, the most important first.
    contexts: tokens before the decoded ones in `context`.
    toy: whether models are shrunk to a smoke test.
    short: whether only the cases of `_short` are run.
    case_seconds: the time after which a case is given up.
  """

  lengths: tuple[int, ...]
  tokens: int
  mode_length: int
  batches: tuple[int, ...]
  contexts: tuple[int, ...]
  toy: bool
  short: bool = False
  case_seconds: int = 900


FULL = Plan((2048, 32768, 8192), 32768, 8192, (1, 64, 6), (1_000, 100_000), toy=False)
TOY = Plan((64,), 64, 64, (1,), (10, 100), toy=True)
# Name -> the plan, and the same at toy size. In the short plan, what hangs must not take all.
PLANS = {
    "full": (FULL, TOY),
    "short": (
        dataclasses.replace(FULL, batches=(1, 6, 64), short=True, case_seconds=150),
        dataclasses.replace(TOY, batches=(1, 6), short=True),
    ),
}


@dataclasses.dataclass(frozen=True)
class Rival:
  """A case of another project, run by a module of its own."""

  module: str
  arguments: tuple[str, ...]


def _fla(family: str, batch_size: int, length: int, tuning: str) -> Rival:
  """Returns the case that trains flash-linear-attention's model of a family."""
  return Rival("fla_rival", (family, str(batch_size), str(length), tuning))


def _model(name: str, plan: Plan, dense: str) -> tuple[str, dict[str, str]]:
  """Returns the experiment and the overrides of a model."""
  file = "dense_retnet_1p3b" if name == LARGE else "family_350m"
  argument = "" if name == LARGE else name
  overrides = dict(DENSE[dense])
  if plan.toy:
    argument = f"{argument}-debug".removeprefix("-")
    overrides |= {"model.vocab_size": "258", "model.layers": "3", "model.block_layers": "0"}
  return f"experiments/{file}.py:{argument}".removesuffix(":"), overrides


def _train(name: str, plan: Plan, dense: str, length: int, **model: str) -> Case:
  spec, overrides = _model(name, plan, dense)
  overrides |= {"data.seq_len": str(length), "train.batch_size": str(plan.tokens // length)}
  overrides |= {f"model.{key}": value for key, value in model.items()}
  return Case("train", spec, overrides, REMAT)


def _ranked(plan: Plan) -> Iterator[tuple[int, str, Case | Rival]]:
  """Yields rank (1 is run first), name and case."""
  for name in (*TIMED_FAMILIES, LARGE):
    for dense in DENSE:
      if dense == "inputs-1" and not name.startswith("gau_retnet"):
        continue
      for rank, length in enumerate(plan.lengths, 4 if dense == "state-1" else 1):
        case = _train(name, plan, dense, length)
        yield rank + (name in LATER), f"train/{name}/{dense}/T{length}", case
  for family in TIMED_FAMILIES:
    later = family in LATER
    if family in fla_rival.FAMILIES:
      for rank, length in enumerate(plan.lengths, 1):
        rival = _fla(family, plan.tokens // length, length, "tuned")
        yield rank + later, f"rival/{family}/base/T{length}", rival
    # For matrix states, the recurrent form is only the specification: too slow to compare.
    for form in resolver.IMPLEMENTATIONS[FAMILIES[family].form]:
      if form != "recurrent" or FAMILIES[family].form == "diagonal":
        length = plan.mode_length
        case = _train(family, plan, "base", length, implementation=form)
        yield 1 + later, f"mode/{family}/{form}/T{length}", case
    for dense in ("base", "state-2"):
      spec, overrides = _model(family, plan, dense)
      for rank, batch in enumerate(plan.batches, 1):
        case = Case("decode", spec, overrides, batch_size=batch)
        yield rank + later, f"decode/{family}/{dense}/B{batch}", case
      for context in plan.contexts:
        case = Case("decode", spec, overrides, context=context)
        rank = 1 + later + (dense != "base")
        yield rank, f"context/{family}/{dense}/{context}", case


def _short(plan: Plan) -> Iterator[tuple[str, Case | Rival]]:
  """Yields name and case of the short plan, in the order in which they run."""
  for family in CHECKED_FAMILIES:
    yield f"check/{family}/kernels/small", Case("check", family, toy=plan.toy)
  yield "rates/card/all/large", Case("rates", "all", toy=plan.toy)
  length = plan.lengths[0]
  for sources in (0, 2):
    for family in CHECKED_FAMILIES:
      case = Case("layer", family, sources=sources, toy=plan.toy)
      yield f"layer/{family}/state-{sources}/T2048", case
  for dense in ("base", "state-2"):
    for family in CHECKED_FAMILIES:
      yield f"train/{family}/{dense}/T{length}", _train(family, plan, dense, length)
  for dense in ("base", "state-2"):
    for batch in plan.batches:
      spec, overrides = _model("mamba2", plan, dense)
      yield f"decode/mamba2/{dense}/B{batch}", Case("decode", spec, overrides, batch_size=batch)
  for family in ("retnet", "mamba2"):
    rival = _fla(family, plan.tokens // length, length, "fixed")
    yield f"rival/{family}/base/T{length}", rival
  for name in ("ssd", "scan"):
    yield f"operation/{name}/ours/T2048", Case("operation", name, toy=plan.toy)
    yield f"operation/{name}/mamba_ssm/T2048", Rival("op_rival", (name,))


def cases(plan: Plan) -> dict[str, Case | Rival]:
  """Returns all cases by name, the most important first."""
  if plan.short:
    return dict(_short(plan))
  ranked = sorted(_ranked(plan), key=lambda entry: entry[0])
  return {name: case for _, name, case in ranked}


def run(case: Case | Rival, plan: Plan, rival_python: str) -> dict[str, Any]:
  """Runs a case; returns its figures, or {"skipped": why} or {"failed": why}."""
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  if plan.toy:
    environment["JAX_PLATFORMS"] = "cpu"
  if isinstance(case, Rival):
    command = [rival_python, "-m", f"experiments.benchmarks.{case.module}", *case.arguments]
  else:
    command = [sys.executable, "-m", "experiments.benchmarks.gpu_case",
               json.dumps(dataclasses.asdict(case))]
  try:
    done = subprocess.run(
        command, cwd=common.ROOT, env=environment, capture_output=True, text=True,
        timeout=plan.case_seconds, check=False,
    )
  except subprocess.TimeoutExpired:
    return {"failed": f"not done after {plan.case_seconds} s"}
  lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
  if done.returncode:
    # jax ends a traceback with two lines about itself.
    lines = [line for line in lines if not line.startswith(("For simplicity, JAX", "-----"))]
    print("\n".join(lines[-TOLD:]), flush=True)
    return {"failed": lines[-1][:300] if lines else f"exit status {done.returncode}"}
  return json.loads(lines[-1])


def _rehearsed(case: Case | Rival) -> Case | Rival:
  """Returns a case that compiles what `case` runs, in less memory."""
  if isinstance(case, Rival):
    if case.module == "fla_rival":  # One row: its kernels' programs depend on lengths alone.
      family, _, *rest = case.arguments
      return dataclasses.replace(case, arguments=(family, "1", *rest))
    return case
  return dataclasses.replace(case, compile_only=True)


def rehearse(
    chosen: Mapping[str, Case | Rival], plan: Plan, python: str, jobs: int
) -> Iterator[tuple[str, Results]]:
  """Compiles cases side by side, for later processes with the same JAX_COMPILATION_CACHE_DIR.

  Yields:
    Name and figures of the checks, which do not depend on what runs beside them.
  """
  patient = dataclasses.replace(plan, case_seconds=2 * plan.case_seconds)
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    # The longest begin first: training, and dense models before others.
    names = sorted(chosen, key=lambda name: (not name.startswith("train/"), "/base/" in name))
    waiting = {
        pool.submit(run, _rehearsed(chosen[name]), patient, python): name for name in names
    }
    for future in common.progress(list(waiting), "cases compiled"):
      name = waiting[future]
      if name.startswith("check/"):
        yield name, future.result()
      elif "failed" in future.result():
        print(f"{name}: not compiled: {future.result()['failed']}", flush=True)


def earlier(path: str, hardware: str = "") -> Results:
  """Returns the results that the file already has; {} if there is no file.

  Raises:
    SystemExit: the results are from other hardware than is given.
  """
  if not path or not pathlib.Path(path).is_file():
    return {}
  before = json.loads(pathlib.Path(path).read_text())
  if hardware and before["hardware"] != hardware:
    raise SystemExit(f"{path} is of other hardware, {before['hardware']}: name another file")
  return before["results"]


def main(arguments: Sequence[str]) -> None:
  """Runs the cases and prints the tables."""
  parser = common.parser(__doc__)
  parser.add_argument("--plan", choices=PLANS, default="full", help="which cases (full)")
  parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU: a smoke test")
  parser.add_argument("--only", nargs="+", default=[""], metavar="PREFIX",
                      help="the cases whose names begin so, such as train/mamba2")
  parser.add_argument("--budget-seconds", type=float, default=float("inf"), metavar="S",
                      help="start no case after S seconds")
  parser.add_argument("--side-by-side", type=int, default=0, metavar="N",
                      help="first compile N cases at a time, for the measurements to load (no)")
  parser.add_argument("--fla-python", default=sys.executable, metavar="PYTHON",
                      help="the Python that has the rivals (this one)")
  parser.add_argument("--prices", default="", metavar="FILE",
                      help="of `prices` for h100 or h200: estimates beside what is measured")
  parser.add_argument("--tables", action="store_true", help="only the tables of --json FILE")
  options = parser.parse_args(arguments)
  start = time.monotonic()
  hardware = common.hardware()
  print(f"{hardware}\n", flush=True)
  plan = PLANS[options.plan][options.toy]
  chosen = {name: case for name, case in cases(plan).items()
            if name.startswith(tuple(options.only))}
  results = earlier(options.json, "" if options.tables else hardware)
  waiting = [name for name in chosen if name not in results and not options.tables]

  def keep(name: str, figures: Results) -> None:
    results[name] = figures
    for reason in ("failed", "skipped"):
      if reason in figures:
        print(f"{name}: {reason}: {figures[reason]}", flush=True)
    if options.json:
      common.write_json(options.json, common.record(
          "gpu", arguments,
          "tokens/s, seconds, bytes; mfu: see models/flops.py; errors: see gpu_layer.py", results,
      ))

  with tempfile.TemporaryDirectory() as compiled:
    if options.side_by_side:
      os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
      unknown = {name: chosen[name] for name in waiting}
      for name, figures in rehearse(unknown, plan, options.fla_python, options.side_by_side):
        keep(name, figures)
      print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
      waiting = [name for name in waiting if name not in results]
    for name in common.progress(waiting, "cases"):
      if time.monotonic() - start > options.budget_seconds:
        print(f"the budget is spent before {name}", flush=True)
        break
      keep(name, run(chosen[name], plan, options.fla_python))
  prices: dict[str, Any] = {}
  if options.prices:
    prices = json.loads(pathlib.Path(options.prices).read_text())["results"]
  for table in tables(results, prices):
    print(table, flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
