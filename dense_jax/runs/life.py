"""Signs of life of a run: its heartbeat, how each process began and ended, stacks if it hangs.

heartbeat.json says what the run was doing when, so that anybody can see whether it still does. It
is written by the thread that trains: where that hangs, the heartbeat stops.
"""

import dataclasses
import faulthandler
import json
import logging
import os
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType

import jax
from etils import epath

from dense_jax import distributed
from dense_jax.errors import DivergedError
from dense_jax.files import is_remote, parse_json, write_atomically
from dense_jax.training.events import note_event, read_events
from dense_jax.training.loop import Hook, Moment

HEARTBEAT_FILE = "heartbeat.json"
STACKS = "stacks-{process}.txt"
TRAINING, ENDED = "training", "ended"
_BEAT_SECONDS, _REMOTE_BEAT_SECONDS = 10.0, 30.0
_LEAST_SECONDS = 1.0
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Heartbeat:
  """The last sign of life of a run.

  Attributes:
    time: when it said so, in seconds since 1970.
    step: steps done.
    steps: steps in all.
    doing: such as "training", "saving" or "evaluating"; "ended" if the process is done.
    host, pid: the first process.
  """

  time: float
  step: int
  steps: int
  doing: str
  host: str
  pid: int


def read_heartbeat(workdir: epath.Path) -> Heartbeat | None:
  """Reads a run's heartbeat; returns None if there is none that can be read."""
  try:
    return Heartbeat(**parse_json((workdir / HEARTBEAT_FILE).read_bytes()))
  except (OSError, TypeError, ValueError):
    return None


class Life:
  """A context in which a process trains: it says so, and how that ended."""

  def __init__(self, workdir: epath.Path, step: int, steps: int, hang_seconds: int) -> None:
    """Prepares the context.

    Args:
      workdir: the run's folder.
      step: steps done.
      steps: steps in all.
      hang_seconds: seconds without a sign after which the stacks of all threads are written; 0
        means never. Each process watches itself.
    """
    self._workdir, self._step, self._steps = workdir, step, steps
    self._hang_seconds = hang_seconds
    self._doing = "starting"
    self._wrote = self._armed = -float("inf")
    self._interval = _REMOTE_BEAT_SECONDS if is_remote(workdir) else _BEAT_SECONDS
    self._ending, self._by = "end", ""
    name = STACKS.format(process=jax.process_index())
    # faulthandler needs a file of this machine.
    self._stacks = (
        Path(tempfile.gettempdir()) / f"dense_jax-{os.getpid()}-{name}" if is_remote(workdir)
        else Path(workdir / name)
    )

  def __enter__(self) -> "Life":
    before = read_heartbeat(self._workdir)
    if before and before.doing != ENDED:
      when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(before.time))
      self._record("killed", f"process {before.pid} on {before.host} ended without a word; it was "
                   f"last heard of at {when}, {before.doing} after step {before.step}")
    devices = jax.devices()
    self._record("start", f"from step {self._step} to {self._steps}, on {len(devices)} x "
                 f"{devices[0].device_kind} in {jax.process_count()} processes")
    if self._hang_seconds:
      self._file = open(self._stacks, "a")
      self._size = os.fstat(self._file.fileno()).st_size
    self.beat(self._step, "compiling")
    return self

  def beat(self, step: int, doing: str = TRAINING) -> None:
    """Says that the run is alive; call it at every step, and before anything that takes long."""
    now, changes = time.monotonic(), doing != self._doing
    self._step, self._doing = step, doing
    if self._hang_seconds and now - self._armed > _LEAST_SECONDS:
      self._armed = now
      faulthandler.dump_traceback_later(self._hang_seconds, file=self._file)
      self._look_at_stacks()
    if now - self._wrote > (_LEAST_SECONDS if changes else self._interval):
      self._wrote = now
      self._write()

  def during(self, doing: str, hook: Hook) -> Hook:
    """Returns a hook that says what the run is doing while it is called."""

    def run(moment: Moment) -> None:
      self.beat(moment.step, doing)
      hook.run(moment)
      self.beat(moment.step)

    return dataclasses.replace(hook, run=run)

  def interrupted(self, by: str) -> None:
    """Says that the process ends before the last step, and who asked it to."""
    self._ending, self._by = "interrupted", f", by {by}"

  def _look_at_stacks(self) -> None:
    size = os.fstat(self._file.fileno()).st_size
    if size > self._size:
      self._size = size
      self._record("hung", f"nothing was done for {self._hang_seconds} s; the stacks of all "
                   f"threads are in {self._stacks}")

  def _write(self) -> None:
    if not distributed.is_first():
      return
    beat = Heartbeat(time.time(), self._step, self._steps, self._doing, socket.gethostname(),
                     os.getpid())
    content = json.dumps(dataclasses.asdict(beat)).encode()
    try:
      write_atomically(self._workdir / HEARTBEAT_FILE, content)
    except Exception as error:  # A bucket has errors of its own.
      _LOG.warning("a sign of life could not be written: %s", error)

  def _record(self, kind: str, text: str) -> None:
    note_event(self._workdir, self._step, kind, text)

  def __exit__(
      self, kind: type[BaseException] | None, error: BaseException | None,
      trace: TracebackType | None,
  ) -> None:
    del kind, trace
    if self._hang_seconds:
      faulthandler.cancel_dump_traceback_later()
      self._look_at_stacks()
      self._file.close()
      if not self._size:
        self._stacks.unlink(missing_ok=True)
    if isinstance(error, KeyboardInterrupt):
      self._record("interrupted", str(error) or "ended by a request")
    elif error is None:
      self._record(self._ending, f"after step {self._step} of {self._steps}{self._by}")
    elif not isinstance(error, DivergedError):  # Which has been recorded.
      said = str(error).partition("\n")[0][:300]
      self._record("failed", f"{type(error).__name__}: {said}")
    if self._workdir.is_dir():
      self._doing = ENDED
      self._write()


def first_start(workdir: epath.Path) -> float:
  """Returns when the run's first process began to train, in seconds since 1970; now if none did."""
  starts = [event.time for event in read_events(workdir) if event.kind == "start"]
  return min(starts, default=time.time())
