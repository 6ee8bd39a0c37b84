"""Full and read-only disks, on a small tmpfs of their own."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator

from tests.faults import runs
from tests.faults.children import Child, Trial
from tests.faults.runs import Base, Outcome

FULL, PASSING, READ_ONLY, CACHE = (
    "disk full while saving", "disk full for a while", "disk read-only while saving",
    "disk of the cache full",
)


def can_mount() -> bool:
  """Returns whether this process may mount a tmpfs."""
  return os.geteuid() == 0 and subprocess.run(
      ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True,
      check=False,
  ).returncode == 0


@contextlib.contextmanager
def disk(place: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
  """Mounts a tmpfs of so many bytes at a new folder, and unmounts it at the end."""
  place.mkdir()
  subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
  try:
    yield place
  finally:
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: pathlib.Path, left: int) -> pathlib.Path:
  """Fills a disk but for so many bytes; returns the file that does it."""
  ballast, free = place / ".ballast", os.statvfs(place)
  with open(ballast, "wb") as file:
    file.write(bytes(max(free.f_bavail * free.f_bsize - left, 0)))
  return ballast


def trials(base: Base, seed: int, count: int, size: int) -> Iterator[Trial]:
  """Yields `count` trials of each row; `size` is that of a checkpoint, in bytes."""
  rng = random.Random(seed)
  for index in range(count):
    left = int(size * rng.uniform(0.2, 1.5))
    yield _full(base, base.folder / f"full-{index}", left)
    yield _passing(base, base.folder / f"passing-{index}", int(size * rng.uniform(0.1, 0.6)))
    yield _read_only(base, base.folder / f"read-only-{index}")
    yield _full_cache(base, base.folder / f"cache-{index}", rng.randrange(20_000))


def _full(base: Base, place: pathlib.Path, left: int) -> Trial:
  """The disk fills up: the run ends with a sentence, and the same command goes on later."""
  with disk(place, 64 * 2**20):
    workdir = place / "run"
    [child] = yield [base.train(workdir, kill_at=80)]
    newest, logged = max(runs.saved(workdir), default=0), runs.done(workdir)
    ballast = fill(place, left)
    [child] = yield [base.train(workdir, before=_impatient)]
    if child.status != 2 or "No space left on device" not in child.said:
      return Outcome(FULL, 1, runs.tail(child))
    if "Traceback" in child.said:
      return Outcome(FULL, 1, f"a traceback: {runs.tail(child)}")
    ballast.unlink()
    newest, logged = max(runs.saved(workdir), default=newest), max(runs.done(workdir), logged)
    [child] = yield [base.train(workdir)]
    wrong = runs.tail(child) if child.status else base.difference(workdir)
    return Outcome(FULL, 1, wrong, (max(logged - newest, 0),))


def _passing(base: Base, workdir: pathlib.Path, left: int) -> Trial:
  """The disk is full during one save: that is told, and the next one is tried and succeeds."""
  with disk(workdir, 64 * 2**20) as place:
    ballast: list[pathlib.Path] = []

    def during(child: Child) -> None:
      if not ballast and runs.saved(workdir):
        child.signal(signal.SIGSTOP)
        ballast.append(fill(place, left))
        child.signal(signal.SIGCONT)
      elif ballast and ballast[0].exists() and "could not be saved, and" in child.said:
        ballast[0].unlink()

    [child] = yield [base.train(workdir, before=_slow_steps, during=during)]
    wrong = runs.tail(child) if child.status else base.difference(workdir)
    if not wrong and "could not be saved, and" not in child.said:
      wrong = "no save failed"
    return Outcome(PASSING, 1, wrong)


def _impatient() -> None:
  """Lets saves that fail be tried again within two seconds."""
  from dense_jax.training import checkpoint

  checkpoint._RETRY_SECONDS = (0.0, 0.5, 1.0)


def _slow_steps() -> None:
  """Makes each step take a moment, so that a full disk is met between two steps."""
  from dense_jax.runs import training

  train = training.train

  def slow(*arguments, on_metrics, **options):
    def later(step, metrics):
      time.sleep(0.15)
      on_metrics(step, metrics)

    return train(*arguments, on_metrics=later, **options)

  training.train = slow


def _read_only(base: Base, place: pathlib.Path) -> Trial:
  """The folder of checkpoints becomes read-only, and writable again for the next start."""
  place.mkdir()
  workdir = place / "run"
  folder = workdir / "checkpoints"
  [child] = yield [base.train(workdir, kill_at=80)]
  newest, logged = max(runs.saved(workdir), default=0), runs.done(workdir)
  folder.mkdir(exist_ok=True)
  subprocess.run(["mount", "--bind", folder, folder], check=True)
  try:
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    [child] = yield [base.train(workdir, before=_impatient)]
  finally:
    subprocess.run(["umount", "--lazy", folder], check=True)
  if child.status != 2 or "Read-only file system" not in child.said:
    return Outcome(READ_ONLY, 1, runs.tail(child))
  logged = max(logged, runs.done(workdir))
  [child] = yield [base.train(workdir)]
  wrong = runs.tail(child) if child.status else base.difference(workdir)
  return Outcome(READ_ONLY, 1, wrong, (max(logged - newest, 0),))


def _full_cache(base: Base, place: pathlib.Path, left: int) -> Trial:
  """The disk of the cache is full while the text is tokenized."""
  with disk(place, 2**20):
    ballast = fill(place, left)
    workdir = base.folder / f"{place.name}-run"
    cache = f"--config.data.cache_dir={place}/data"
    [child] = yield [base.train(workdir, cache)]
    if child.status not in (0, 2) or (child.status and "No space left" not in child.said):
      return Outcome(CACHE, 1, runs.tail(child))
    ballast.unlink()
    [child] = yield [base.train(workdir, cache)]
    wrong = runs.tail(child) if child.status else base.difference(workdir)
    return Outcome(CACHE, 1, wrong)
