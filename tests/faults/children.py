"""Commands run in forked children of one warm process, and what is done to them.

The parent has imported everything and asked jax for no device, so that a child that trains a tiny
model is done after a second or two. A child counts the file operations by which it changes the
disk, and can be killed before any of them.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import itertools
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

# Operations of Python's audit events that change a file system.
_CHANGES = frozenset({
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclasses.dataclass(frozen=True)
class Start:
  """A child to start, and what happens to it.

  Attributes:
    action: what it does; returns the exit status.
    kill_after: seconds after which it is killed (-9) from outside; None means never.
    kill_at: the number, from 0, of the file operation before which it kills itself; None: never.
    kill_when: a pattern; it kills itself before the first file operation that matches. Operations
      are written as "thread: event path ...".
    during: called in the parent, again and again, with the child.
    environment: variables of the child.
  """

  action: Callable[[], int]
  kill_after: float | None = None
  kill_at: int | None = None
  kill_when: str = ""
  during: Callable[["Child"], None] = lambda child: None
  environment: tuple[tuple[str, str], ...] = ()


def command(module: str, *arguments: str, before: Callable[[], None] | None = None
            ) -> Callable[[], int]:
  """Returns an action that runs a command of dense_jax.cli as its console command does.

  Args:
    module: its module.
    arguments: its arguments.
    before: called first, for example to put a fault into a function.
  """

  def run() -> int:
    if before is not None:
      before()
    main = importlib.import_module(f"dense_jax.cli.{module}").main
    sys.argv = [module, *arguments]
    importlib.import_module("dense_jax.cli.common").run(main)
    return 0

  return run


@dataclasses.dataclass
class Child:
  """A started child; once it has ended, `status` is its exit status, or -9 if it was killed."""

  start: Start
  pid: int
  log: pathlib.Path
  began: float
  status: int | None = None
  seconds: float = 0.0

  @property
  def said(self) -> str:
    """What it has printed."""
    return self.log.read_text(errors="replace")

  @property
  def operations(self) -> list[str]:
    """The file operations that it has begun."""
    return self.log.with_suffix(".operations").read_text(errors="replace").splitlines()

  def signal(self, number: int) -> None:
    """Sends it a signal, if it still runs."""
    if self.status is None:
      os.kill(self.pid, number)


# Yields children to start side by side, and gets them back when all have ended. If one fails, the
# others have a few seconds left, as launch/local.py does it.
Trial = Generator[list[Start], list[Child], Any]
_GRACE_SECONDS = 3.0


def warm_up() -> None:
  """Imports what the commands import, without asking for a device."""
  for name in ("grain", "orbax.checkpoint", "tensorboardX", "optax", "tensorstore",
               "dense_jax.cli.train", "dense_jax.cli.evaluate", "dense_jax.cli.verify",
               "dense_jax.training.checkpoint", "experiments.smoke"):
    importlib.import_module(name)


def run_all(trials: Iterable[Trial], folder: pathlib.Path, jobs: int) -> Iterator[Any]:
  """Runs trials, `jobs` at a time; yields what each returns, as they end."""
  waiting, numbers = iter(trials), itertools.count()
  active: list[tuple[Trial, list[Child]]] = []

  def go_on(trial: Trial, children: list[Child] | None) -> Iterator[Any]:
    try:
      starts = next(trial) if children is None else trial.send(children)
    except StopIteration as ended:
      yield ended.value
      return
    active.append((trial, [_fork(start, folder / f"{next(numbers)}.log") for start in starts]))

  done = False
  while active or not done:
    while not done and len(active) < jobs:
      trial = next(waiting, None)
      done = trial is None
      if trial is not None:
        yield from go_on(trial, None)
    for entry in list(active):
      trial, children = entry
      if _have_ended(children):
        active.remove(entry)
        yield from go_on(trial, children)
    time.sleep(0.005)


def _have_ended(children: list[Child]) -> bool:
  running = [child for child in children if child.status is None and not _has_ended(child)]
  failed = [child for child in children if child.status]
  for child in running if failed else ():
    if time.monotonic() - failed[0].began - failed[0].seconds > _GRACE_SECONDS:
      child.signal(signal.SIGKILL)
  return not running


def _fork(start: Start, log: pathlib.Path) -> Child:
  for file in (log, log.with_suffix(".operations")):
    file.write_bytes(b"")
  pid = os.fork()
  if pid == 0:
    _run_child(start, log)
  return Child(start, pid, log, time.monotonic())


def _has_ended(child: Child) -> bool:
  child.seconds = time.monotonic() - child.began
  pid, status = os.waitpid(child.pid, os.WNOHANG)
  if pid:
    child.status = os.waitstatus_to_exitcode(status)
    return True
  if child.start.kill_after is not None and child.seconds >= child.start.kill_after:
    os.kill(child.pid, signal.SIGKILL)
  else:
    child.start.during(child)
  return False


def _run_child(start: Start, log: pathlib.Path) -> None:
  """Runs a child; does not return."""
  status = 99
  try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: none outlives the campaign.
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(start.environment)
    _watch_files(start, log.with_suffix(".operations"))
    status = start.action()
  except SystemExit as ended:
    status = ended.code if isinstance(ended.code, int) else 98
  except BaseException:
    traceback.print_exc()
  finally:
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      sys.stderr.flush()
      if status == 0 and (jax := sys.modules["jax"]).distributed.is_initialized():
        jax.distributed.shutdown()  # As at the end of a process, none of whose hooks runs here.
    os._exit(status)


def _watch_files(start: Start, file: pathlib.Path) -> None:
  """Writes down each operation that changes a file, before it happens; kills where it is asked."""
  written = os.open(file, os.O_WRONLY | os.O_APPEND)
  pattern = re.compile(start.kill_when) if start.kill_when else None
  count = 0

  def hook(event: str, arguments: tuple[Any, ...]) -> None:
    nonlocal count
    if event == "open":
      flags = arguments[2] or 0
      if not flags & _WRITES:
        return
    elif event not in _CHANGES:
      return
    paths = (part for part in arguments if isinstance(part, (str, bytes, os.PathLike)))
    places = " ".join(map(str, paths))
    if "/.cache/" in places or "/dev/" in places:
      return
    line = f"{threading.current_thread().name}: {event} {places}"
    os.write(written, line.encode(errors="replace") + b"\n")
    if count == start.kill_at or (pattern is not None and pattern.search(line)):
      os.kill(os.getpid(), signal.SIGKILL)
    count += 1

  sys.addaudithook(hook)
