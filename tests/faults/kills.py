"""Kills (-9) at random and at chosen moments, stops, and clocks that are set back."""

import os
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Iterator

from tests.faults import runs
from tests.faults.children import Child, Start, Trial, command
from tests.faults.runs import STEPS, Base, Outcome

RANDOM, OPERATION, MOMENT = "kill -9 at a random time", "kill -9 before a random file operation", (
    "kill -9 at a chosen moment")
# Moment -> the file operation before which the process kills itself.
MOMENTS = {
    "the lock is taken": r"open .*/lock\.json",
    "the configuration is written": r"os\.rename .*/config\.json",
    "a save begins": r"os\.mkdir .*orbax-checkpoint-tmp",
    "the arrays are written": r"(open|os\.mkdir) .*orbax-checkpoint-tmp.*/optimizer",
    "the digests are written": r"open .*orbax-checkpoint-tmp.*/digests",
    "the commit": r"os\.rename .*orbax-checkpoint-tmp\S* ",
    "an old one is put away": r"os\.rename .*/checkpoints/deleted/",
    "an old one is deleted": r"checkpoint deleter: os\.(remove|rmdir)",
    "the metrics are opened": r"open .*/metrics\.jsonl",
}


def chains(base: Base, seed: int, row: str, count: int, unbroken: Child) -> Iterator[Trial]:
  """Yields runs that are killed a few times each, `count` times in all.

  Args:
    base: the run.
    seed: of what is random.
    row: RANDOM or OPERATION.
    count: kills.
    unbroken: the process that did the run in one piece.
  """
  rng = random.Random(seed)
  for index, left in enumerate(range(count, 0, -4)):
    faults = []
    for _ in range(min(left, 4)):
      if row == RANDOM:
        faults.append({"kill_after": rng.uniform(0.1, 0.8) * unbroken.seconds})
      else:
        faults.append({"kill_at": rng.randrange(len(unbroken.operations) // 2)})
    yield chain(base, base.folder / f"chain-{row[-4:]}-{index}", row, faults)


def moments(base: Base, seed: int, after_others: bool) -> Iterator[Trial]:
  """Yields kills at each moment, also in the evaluation, in the first second and in the last.

  Args:
    base: the run.
    seed: of what is random.
    after_others: whether the run was killed, and went on, before.
  """
  rng = random.Random(seed)
  faults = {
      **{name: {"kill_when": pattern} for name, pattern in MOMENTS.items()},
      "evaluation": {"before": in_evaluation},
      "first second": {"kill_after": rng.uniform(0, 1)},
      "last save": {"kill_when": rf"os\.rename .*/checkpoints/{STEPS}$"},
      "the end": {"kill_when": r"os\.remove .*/lock\.json"},
  }
  for name, fault in faults.items():
    workdir = base.folder / f"moment-{int(after_others)}-{name.replace(' ', '-')}"
    before = [{"kill_at": rng.randrange(60, 160)}] if after_others else []
    yield chain(base, workdir, MOMENT, [*before, fault])


def in_evaluation() -> None:
  """Makes this process kill itself in its second evaluation."""
  from dense_jax.evaluation.evaluators import HeldOutLoss

  evaluate, calls = HeldOutLoss.evaluate, []

  def killed(self, snapshot):
    calls.append(1)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(self, snapshot)

  HeldOutLoss.evaluate = killed


def chain(
    base: Base, workdir: pathlib.Path, row: str, faults: list[dict], last: dict | None = None
) -> Trial:
  """Kills one run again and again, and lets it end then; each start must lose nothing.

  Args:
    base: the run.
    workdir: its folder.
    row: the row of the table.
    faults: options of `Base.train`, for each start that is killed.
    last: the options of the one that is not; None means none.
  """
  lost: list[int] = []
  kills = 0
  for fault in [*faults, last or {}]:
    before, logged = runs.saved(workdir), runs.done(workdir)
    [child] = yield [base.train(workdir, **fault)]
    killed = child.status == -signal.SIGKILL
    if not killed and child.status != 0:
      return Outcome(row, kills, f"{workdir.name}: {runs.tail(child)}")
    kills += killed
    began = runs.went_on_from(child)
    if began is not None:
      newest = max(before, default=0)
      if began != newest:
        return Outcome(row, kills, f"{workdir.name}: began at {began}, but {newest} was saved")
      if logged:
        lost.append(max(logged - began, 0))
  shown = base.difference(workdir)
  if not shown:
    shutil.rmtree(workdir)
  return Outcome(row, kills, shown and f"{workdir.name}: {shown}", tuple(lost))


STOPPED, CLOCK = "SIGSTOP for two seconds", "clock set back by a day"


def stops(base: Base, seed: int, count: int, seconds: float) -> Iterator[Trial]:
  """Yields runs that are stopped and go on."""
  rng = random.Random(seed)
  for index in range(count):
    yield _stopped(base, base.folder / f"stop-{index}", rng.uniform(0.2, 0.9) * seconds)


def _stopped(base: Base, workdir: pathlib.Path, at: float) -> Trial:
  sent: list[float] = []

  def during(child: Child) -> None:
    if not sent and child.seconds >= at:
      child.signal(signal.SIGSTOP)
      sent.append(time.monotonic())
    elif len(sent) == 1 and time.monotonic() - sent[0] > 2:
      child.signal(signal.SIGCONT)
      sent.append(0.0)

  [child] = yield [base.train(workdir, during=during)]
  wrong = runs.tail(child) if child.status else base.difference(workdir)
  return Outcome(STOPPED, 1, wrong)


def clocks(base: Base, count: int) -> Iterator[Trial]:
  """Yields runs whose clock is set back in the middle, and between two starts."""
  for index in range(count):
    yield _clock(base, base.folder / f"clock-{index}", 120 + 60 * index)


def _clock(base: Base, workdir: pathlib.Path, at: int) -> Trial:
  [child] = yield [base.train(workdir, before=_clock_jumps_back, kill_at=at)]
  if child.status != -signal.SIGKILL:
    return Outcome(CLOCK, 1, runs.tail(child))
  newest, logged = max(runs.saved(workdir), default=0), runs.done(workdir)
  [child] = yield [base.train(workdir, before=_clock_is_back)]
  wrong = runs.tail(child) if child.status else base.difference(workdir)
  if not wrong and runs.went_on_from(child) != newest:
    wrong = f"it went on from {runs.went_on_from(child)} instead of {newest}"
  return Outcome(CLOCK, 1, wrong, (logged - newest,))


def _clock_is_back() -> None:
  real = time.time
  time.time = lambda: real() - 86400
  real_ns = time.time_ns
  time.time_ns = lambda: real_ns() - 86400 * 10**9


def _clock_jumps_back() -> None:
  real, began = time.time, time.monotonic()
  time.time = lambda: real() - (86400 if time.monotonic() - began > 1 else 0)


PROCESSES = "kill -9 of one of two processes"


def of_two_processes(base: Base, seed: int, count: int) -> Trial:
  """Kills one of two processes, again and again; the last start has one process, four devices.

  The sums over devices are made in another order then, so that losses are close, not equal.
  """
  rng = random.Random(seed)
  workdir = base.folder / "two-processes"
  lost: list[int] = []
  kills = 0
  for turn in range(count + 1):
    before, logged = runs.saved(workdir), runs.done(workdir)
    if turn == count:
      outcomes = yield [_one_of(base, workdir, 0, None)]
    else:
      port, victim = runs.free_port(), rng.randrange(2)
      # Each start comes some steps further.
      at = rng.uniform(turn, turn + 1) * STEPS / count
      outcomes = yield [
          _one_of(base, workdir, number, port, at if number == victim else None)
          for number in range(2)
      ]
      kills += outcomes[victim].status == -signal.SIGKILL
    began = runs.went_on_from(outcomes[0])
    newest = max(before, default=0)
    if began is not None and began != newest:
      return Outcome(PROCESSES, kills, f"began at {began}, but {newest} was saved")
    if began is not None and logged:
      lost.append(max(logged - began, 0))
  if outcomes[0].status:
    return Outcome(PROCESSES, kills, runs.tail(outcomes[0]))
  found = runs.losses(workdir)
  close = found.keys() == base.losses.keys() and all(
      abs(found[step] - loss) < 1e-4 * abs(loss) for step, loss in base.losses.items()
  )
  wrong = "" if close else f"other losses: {found}"
  return Outcome(PROCESSES, kills, wrong or ("" if kills else "none was killed"), tuple(lost))


def _one_of(
    base: Base, workdir: pathlib.Path, number: int, port: int | None,
    kill_at_step: float | None = None,
) -> Start:
  """Starts one of two processes, or the only one (no port), with four devices each."""

  def during(child: Child) -> None:
    if kill_at_step is not None and runs.done(workdir) > kill_at_step:
      child.signal(signal.SIGKILL)

  together = () if port is None else (
      "--coordinator", f"localhost:{port}", "--processes", "2", "--process-id", str(number)
  )
  return Start(
      command("train", *base.arguments(
          workdir, "--config.mesh.data=1", "--config.mesh.fsdp=-1", *together
      )),
      environment=(("XLA_FLAGS", "--xla_force_host_platform_device_count=4"),),
      during=during,
  )
