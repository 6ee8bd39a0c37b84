"""Faults in numbers, killed data workers, and `prepare` on a full disk."""

import os
import pathlib
import random
import signal
from collections.abc import Iterator

import pytest
from etils import epath

from dense_jax.training.events import read_events
from tests import faulty
from tests.data.corpus.texts import files_of
from tests.faults import disks, kills, runs
from tests.faults.children import Child, Start, Trial, command
from tests.faults.runs import EVERY, Base, Outcome

# Row -> batches (from 0) and their faults, the options of the run, and how often it goes back.
FAULTS: dict[str, tuple[dict[int, str], tuple[str, ...], int]] = {
    "NaN in a batch's loss, and a kill": ({5: "nan"}, (), 0),
    "Inf in a batch's gradients, and a kill": ({6: "inf gradient"}, (), 0),
    "a batch with ten times the loss, and a kill": (
        {11: "spike"}, ("--config.guard.skip=spikes", "--config.guard.window=8"), 0,
    ),
    "NaN in two batches, the run goes back, and a kill": (
        {7: "nan", 8: "nan"}, ("--config.guard.in_a_row=2",), 1,
    ),
}
WORKER, PREPARE = "kill -9 of a data worker", "disk full in prepare"


def trials(base: Base, seed: int, count: int) -> Iterator[Trial]:
  """Yields `count` trials of each row of FAULTS, and of killed workers."""
  rng = random.Random(seed)
  for index in range(count):
    for number, row in enumerate(FAULTS):
      yield _numbers(base, base.folder / f"numbers-{index}-{number}", row, rng.uniform(0.3, 0.9))
    yield _worker(base, base.folder / f"worker-{index}")


def _numbers(base: Base, workdir: pathlib.Path, row: str, share: float) -> Trial:
  """A run with faulty batches that is killed ends as one that is not."""
  faults, options, returns = FAULTS[row]
  whole = workdir.with_name(f"{workdir.name}-whole")

  def install() -> None:
    faulty.install(pytest.MonkeyPatch(), faults)

  [child] = yield [base.train(whole, *options, before=install)]
  wrong = runs.tail(child) if child.status else _misjudged(base, whole, faults, returns)
  if wrong:
    return Outcome(row, 1, wrong)
  same = base.with_options(whole, *options)
  kill_at = int(share * len(child.operations))
  return (yield from kills.chain(
      same, workdir, row, [{"kill_at": kill_at, "before": install}], {"before": install}
  ))


def _misjudged(base: Base, workdir: pathlib.Path, faults: dict[int, str], returns: int) -> str:
  """Says what a run did about its faults that it should not have done; "" if nothing."""
  skipped = [line for line in runs.lines(workdir) if "loss" in line][-1]["skipped_steps"]
  went_back = sum(event.kind == "returned" for event in read_events(epath.Path(workdir)))
  if (skipped, went_back) != (0 if returns else len(faults), returns):
    return f"{workdir.name}: {skipped} steps were skipped, and it went back {went_back} times"
  # A run that goes back passes over all batches since its checkpoint.
  same = min(faults) // EVERY * EVERY if returns else min(faults)
  found = runs.losses(workdir)
  if any(found[step] != base.losses[step] for step in range(1, same + 1)):
    return f"{workdir.name}: other losses up to step {same}"
  return ""


def _worker(base: Base, workdir: pathlib.Path) -> Trial:
  """A data worker is killed: it is started again, and the batches stay the same.

  It is killed at once: a little later it has made all batches of so short a run.
  """
  killed: list[int] = []

  def during(child: Child) -> None:
    if not killed and (workers := _workers_of(child.pid)):
      killed.append(workers[0])
      os.kill(workers[0], signal.SIGKILL)

  [child] = yield [base.train(workdir, "--config.data.workers=2", during=during)]
  wrong = runs.tail(child) if child.status else base.difference(workdir)
  if not wrong and "a worker of config.data.workers is gone" not in child.said:
    wrong = f"no worker was missed: {runs.tail(child)}"
  return Outcome(WORKER, len(killed), wrong)


def _workers_of(pid: int) -> list[int]:
  """Returns the processes that serve a training process with data."""
  found = []
  for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
    for child in map(int, file.read_text().split()):
      if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
        found.append(child)
  return found


def full_in_prepare(base: Base, seed: int, count: int) -> Iterator[Trial]:
  """Yields jobs of `prepare` whose disk fills up; the same command goes on, to the same bytes."""
  rng = random.Random(seed)
  for index in range(count):
    yield _full(base, base.folder / f"prepare-{index}", rng.uniform(0, 0.9))


def _full(base: Base, place: pathlib.Path, share: float) -> Trial:
  whole = base.folder / f"{place.name}-whole"
  [child] = yield [_prepare(base, whole)]
  if child.status:
    return Outcome(PREPARE, 1, runs.tail(child))
  expected = files_of(whole)
  with disks.disk(place, 8 * 2**20):
    ballast = disks.fill(place, int(share * sum(map(len, expected.values()))))
    [child] = yield [_prepare(base, place / "corpus")]
    if child.status != 2 or "No space left on device" not in child.said:
      return Outcome(PREPARE, 1, runs.tail(child))
    ballast.unlink()
    [child] = yield [_prepare(base, place / "corpus")]
    wrong = runs.tail(child) if child.status else ""
    if not wrong and files_of(place / "corpus") != expected:
      wrong = "other bytes"
    return Outcome(PREPARE, 1, wrong)


def _prepare(base: Base, output: pathlib.Path) -> Start:
  return Start(command(
      "prepare", "--input", str(base.text / "*"), "--tokenizer", "bytes", "--output", str(output),
      "--heldout-every", "2", "--workers", "1",
  ))
