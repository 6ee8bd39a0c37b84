"""Runs of a sweep: side by side, once each, more seeds where the answer is open."""

import dataclasses
import functools
import json
import os
import sys
import time

import pytest
from etils import epath

from dense_jax.sweeps import running
from dense_jax.sweeps.budgets import course_digest, plan
from dense_jax.sweeps.definition import Cell, Sweep
from dense_jax.sweeps.results import Result, Results
from dense_jax.sweeps.running import Job, jobs, next_jobs, run_jobs, run_sweep, train_command
from tests.helpers import ROOT

SWEEP = Sweep(
    str(ROOT / "experiments/smoke.py:debug"),
    (Cell("base"), Cell("dense", {"model.dense.depth": 2}), Cell("wide", {"model.width": 40})),
    "base", seeds=(0, 1), more_seeds=(2, 3), question="Which?",
)
LOSSES = {"base": 4.0, "dense": 3.0, "wide": 4.0}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
  """A sweep whose runs write a file that says their loss and their cores."""
  folder = epath.Path(tmp_path)
  planned = plan(SWEEP, folder)

  def collect(each, seed, workdir):
    file = workdir / "loss.json"
    if not file.exists():
      return None
    loss = json.loads(file.read_text())[0]
    return Result(each.cell.name, seed, course_digest(each), "text", 1, 1, 1, 1.0,
                  {"heldout_loss": loss})

  monkeypatch.setattr(running, "collect", collect)
  return planned, folder, Results(folder / "results.jsonl", planned, SWEEP.metric)


def write_loss(job: Job) -> list[str]:
  name, seed = job.key
  loss = LOSSES[name] + 0.1 * seed * (1 if name == "wide" else 0) * (-1) ** seed
  return [sys.executable, "-c", f"""
import json, os, pathlib
print("hello")
folder = pathlib.Path({str(job.workdir)!r})
folder.mkdir()
(folder / "loss.json").write_text(json.dumps([{loss}, sorted(os.sched_getaffinity(0))]))
"""]


def test_every_run_is_done_once_and_open_cells_get_more_seeds(sweep):
  planned, folder, results = sweep
  said = []
  keys = []
  while todo := next_jobs(SWEEP, planned, folder, results):
    keys.append([job.key for job in todo])
    assert not run_jobs(todo, results, side_by_side=2, say=said.append, command=write_loss)
  assert keys == [
      [("base", 0), ("dense", 0), ("wide", 0), ("base", 1), ("dense", 1), ("wide", 1)],
      [("base", 2), ("wide", 2)],  # The gain of "dense" is decided.
      [("base", 3), ("wide", 3)],
  ]
  assert len(said) == 10 and any(line.startswith("dense, seed 1: 3.0000") for line in said)
  assert (folder / "dense" / "log_seed1.txt").read_text() == "hello\n"
  assert not next_jobs(SWEEP, planned, folder,
                       Results(folder / "results.jsonl", planned, SWEEP.metric))


def test_runs_side_by_side_share_the_cores(sweep):
  planned, folder, results = sweep
  before = os.sched_getaffinity(0)
  run_jobs(list(jobs(SWEEP, planned, folder, [0])), results, side_by_side=2,
           say=lambda _: None, command=write_loss)
  cores = [set(json.loads((folder / name / "seed0" / "loss.json").read_text())[1])
           for name in LOSSES]
  assert os.sched_getaffinity(0) == before
  if len(before) > 1:
    assert cores[0].isdisjoint(cores[1]) and cores[0] | cores[1] == before


def test_a_system_without_affinity_runs_them_too(sweep, monkeypatch):
  planned, folder, results = sweep
  before = sorted(os.sched_getaffinity(0))
  for name in ("sched_getaffinity", "sched_setaffinity"):
    monkeypatch.delattr(os, name)
  assert not run_jobs(list(jobs(SWEEP, planned, folder, [0])), results, side_by_side=2,
                      say=lambda _: None, command=write_loss)
  for name in LOSSES:
    assert json.loads((folder / name / "seed0" / "loss.json").read_text())[1] == before


def test_a_finished_run_that_is_not_among_the_results_is_collected(sweep):
  planned, folder, results = sweep
  todo = next_jobs(SWEEP, planned, folder, results)
  (folder / "base" / "seed0").mkdir(parents=True)
  (folder / "base" / "seed0" / "loss.json").write_text("[4.0, []]")
  assert len(next_jobs(SWEEP, planned, folder, results)) == len(todo) - 1
  assert ("base", 0) in results


def test_a_run_that_fails_holds_up_no_seed(sweep, monkeypatch):
  """Neither one of the first seeds, nor one of those that undecided cells get."""
  planned, folder, results = sweep
  failing = {("wide", 1), ("base", 2)}

  def command(job):
    return [sys.executable, "-c", "1 / 0"] if job.key in failing else write_loss(job)

  monkeypatch.setattr(running, "run_jobs", functools.partial(run_jobs, command=command))
  failed = run_sweep(SWEEP, planned, folder, results, side_by_side=2, say=lambda _: None)
  assert set(failed) == failing
  assert set(results.of("base")) == {0, 1, 3} and set(results.of("wide")) == {0, 2, 3}


def test_a_run_that_fails_stops_no_other(sweep):
  planned, folder, results = sweep
  said = []

  def command(job):
    if job.key == ("dense", 0):
      return [sys.executable, "-c", "import sys; print('first'); sys.exit('error: no memory')"]
    return write_loss(job)

  failed = run_jobs(list(jobs(SWEEP, planned, folder, [0])), results, side_by_side=1,
                    say=said.append, command=command)
  assert failed == {("dense", 0): "status 1: first / error: no memory"}
  assert ("wide", 0) in results and ("dense", 0) not in results
  assert any("dense, seed 0: failed" in line and "log_seed0.txt" in line for line in said)


@pytest.mark.slow
def test_after_the_limit_no_run_starts_and_those_that_run_end(sweep):
  planned, folder, results = sweep
  said = []

  def command(job):
    if job.key == ("base", 0):
      return write_loss(job)
    return [sys.executable, "-c", "print('saved', flush=True); import time; time.sleep(600)"]

  begin = time.monotonic()
  failed = run_jobs(list(jobs(SWEEP, planned, folder, [0])), results, side_by_side=2,
                    say=said.append, command=command, deadline=begin + 10)
  assert not failed and time.monotonic() - begin < 60
  assert ("base", 0) in results and ("dense", 0) not in results
  ended = [line for line in said if "ended by the limit" in line]
  assert [line.partition(",")[0] for line in ended] == ["dense", "wide"]
  assert "saved" in ended[0]
  left = run_sweep(SWEEP, planned, folder, results, side_by_side=1, say=said.append, deadline=begin)
  assert not left and "5 runs are left: the same command goes on" in said[-1]


def test_runs_side_by_side_share_a_gpus_memory(sweep, monkeypatch):
  planned, folder, results = sweep
  monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)

  def shares(side_by_side):
    def command(job):
      return [sys.executable, "-c",
              "import os; print(os.environ.get('XLA_CLIENT_MEM_FRACTION', 'all'))"]

    first = next(jobs(SWEEP, planned, folder, [0]))
    run_jobs([first], results, side_by_side=side_by_side, say=lambda _: None, command=command)
    return (folder / "base" / "log_seed0.txt").read_text().strip()

  assert (shares(1), shares(3)) == ("all", "0.300")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  assert shares(3) == "all"


def test_an_end_is_passed_on_to_the_runs(sweep, monkeypatch):
  planned, folder, results = sweep
  pids = []

  def interrupted(seconds):
    raise KeyboardInterrupt

  def command(job):
    return [sys.executable, "-c", "import time; time.sleep(600)"]

  popen = running.subprocess.Popen

  def start(*arguments, **options):
    pids.append(popen(*arguments, **options))
    return pids[-1]

  monkeypatch.setattr(running.subprocess, "Popen", start)
  monkeypatch.setattr(running.time, "sleep", interrupted)
  begin = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    run_jobs(list(jobs(SWEEP, planned, folder, [0])), results, side_by_side=2,
             say=lambda _: None, command=command)
  assert len(pids) == 2 and all(process.poll() is not None for process in pids)
  assert time.monotonic() - begin < 60


def test_the_command_of_a_run(sweep):
  planned, folder, _ = sweep
  job = Job(dataclasses.replace(planned[1]), 7, SWEEP.experiment, folder / "dense" / "seed7")
  assert train_command(job) == [
      sys.executable, "-m", "dense_jax.cli.train", "--config", SWEEP.experiment,
      "--workdir", str(folder / "dense" / "seed7"), "--config.model.dense.depth=2",
      "--config.seed=7",
  ]
