"""How a process hears that it must end, what it saves first, and what it says.

Signals, and an output that nobody reads any more, are requests to end. A command obeys one at
once, by the exception `Stopped`, while it has nothing to lose; while it trains, the request waits
until the step is done and saved. A thread of its own sees to it that the process ends either way:
Python runs signal handlers between bytecodes alone, and a compilation can take minutes.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar, NoReturn

# What people, terminals and schedulers send, and what would otherwise end the process.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
# How long the main thread may take to obey at once, before the process is ended from outside it.
_GRACE_SECONDS = 3.0
# A launcher and a terminal may both pass one request on: what follows so soon is the same one.
_SAME_REQUEST_SECONDS = 1.0
_GOODBYE_SECONDS = 3.0
_STATUS = 1
_NO_MORE = b"\0"  # No signal has this number.


class Stopped(KeyboardInterrupt):
  """The process was asked to end, and ends; the message says who asked and what is saved."""


def _listens_to(number: int) -> bool:
  """Whether that signal is a request: nohup ignores SIGHUP for the commands that it starts."""
  return number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN


def open_closed_streams() -> None:
  """Standard streams that the process was begun without (`>&-`) read and write nothing.

  Otherwise the next files that are opened, such as a lock or metrics.jsonl, would take their
  numbers, and what is printed would be written into them.
  """
  for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
    try:
      os.fstat(number)
    except OSError:
      nowhere = os.open(os.devnull, os.O_RDWR)
      if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
      setattr(sys, name, os.fdopen(number, mode, closefd=False))


def end_early() -> None:
  """Until an `Interrupt` takes over, signals end the process with a sentence and status 1."""

  def end(number: int, frame: FrameType | None) -> None:
    del frame
    os.write(2, f"\n{signal.Signals(number).name}: ended before anything was done\n".encode())
    os._exit(_STATUS)

  for number in filter(_listens_to, SIGNALS):
    signal.signal(number, end)


class Interrupt:
  """Turns signals into a request to end; a context, of which the innermost hears them.

  Attributes:
    requested: who asked first, such as "SIGTERM"; empty if nobody has.
  """

  _active: ClassVar["list[Interrupt]"] = []

  def __init__(
      self, meanwhile: Callable[[], str] = lambda: "ended before its work was done", *,
      ends_process: bool = True,
  ) -> None:
    """Hears nothing before it is entered; then it obeys at once.

    Args:
      meanwhile: says what is saved and how to go on, if the process ends now. It may be called
        from another thread.
      ends_process: a second request, and one that the main thread does not hear in time, end the
        process. Otherwise, as in a notebook, a second one raises `Stopped`.
    """
    self.requested = ""
    self._meanwhile = meanwhile
    self._ends_process = ends_process
    self._asked = -math.inf
    self._waits = False
    self._obeyed = False
    self._before: dict[int, Any] = {}

  def wait(self, meanwhile: Callable[[], str]) -> None:
    """From here on a request waits for who reads `requested`; a second one ends the process.

    Raises:
      Stopped: there is a request already.
    """
    self.obey(meanwhile)
    self._waits = True

  def obey(self, meanwhile: Callable[[], str]) -> None:
    """From here on a request is obeyed at once.

    Raises:
      Stopped: there is one already.
    """
    self._meanwhile, self._waits = meanwhile, False
    if self.requested:
      self._obeyed = False  # What a library's callback was told ended there.
      self._stop()

  def ask(self, who: str) -> None:
    """Asks the process to end, in the main thread's name.

    Raises:
      Stopped: where requests are obeyed at once; only once, so that what cleans up can do so.
    """
    self.requested = self.requested or who
    if not self._waits and threading.current_thread() is threading.main_thread():
      self._stop()

  def done(self, status: int) -> None:
    """Says that the process has nothing more to do or say, and ends with `status`.

    Signals are not heard any more. Where a thread of some library keeps the interpreter from
    ending, as one does that prepares a huge batch, the process ends without waiting for it.
    """
    for number in self._before:
      self._before[number] = signal.SIG_IGN
      signal.signal(number, signal.SIG_IGN)
    ending = threading.Timer(_GOODBYE_SECONDS, os._exit, (status,))
    ending.daemon = True
    ending.start()

  def _stop(self) -> None:
    if not self._obeyed:
      self._obeyed = True
      raise Stopped(f"{self.requested}: {self._meanwhile()}")

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    now = time.monotonic()
    if not self.requested:
      self._asked = now
    elif not self._ends_process and now - self._asked > _SAME_REQUEST_SECONDS:
      self._waits = False
    self.ask(signal.Signals(number).name)

  def __enter__(self) -> "Interrupt":
    Interrupt._active.append(self)
    if threading.current_thread() is threading.main_thread():
      if self._ends_process:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
      for number in filter(_listens_to, SIGNALS):
        self._before[number] = signal.signal(number, self._handle)
      if self._ends_process:
        self._watcher = threading.Thread(target=self._watch, name="interrupt", daemon=True)
        self._watcher.start()
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: TracebackType | None,
  ) -> None:
    Interrupt._active.remove(self)
    if not self._before:
      return
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if not self._ends_process:
      return
    signal.set_wakeup_fd(self._wakeup)
    os.write(self._write, _NO_MORE)
    self._watcher.join()
    os.close(self._read)
    os.close(self._write)

  def _watch(self) -> None:
    """Ends the process where the main thread does not, or where it is asked twice."""
    asked = deadline = float("inf")
    while True:
      left = max(deadline - time.monotonic(), 0) if deadline < float("inf") else None
      if not select.select([self._read], [], [], left)[0]:
        self._end()
      heard = os.read(self._read, 1)
      if heard == _NO_MORE:
        return
      now = time.monotonic()
      if asked == float("inf"):
        asked = now
        self.requested = self.requested or signal.Signals(heard[0]).name
        if not self._waits:
          deadline = now + _GRACE_SECONDS
      elif now - asked > _SAME_REQUEST_SECONDS:
        self._end()

  def _end(self) -> NoReturn:
    def say() -> None:
      os.write(2, f"\n{self.requested}: {self._meanwhile()}\n".encode(errors="replace"))
      sys.stdout.flush()

    # A terminal that hangs, or a main thread that holds a lock, must not keep it from ending.
    goodbye = threading.Thread(target=say, daemon=True)
    goodbye.start()
    goodbye.join(_GOODBYE_SECONDS)
    os._exit(_STATUS)


class Output:
  """A standard stream that outlives its reader, and shows what its encoding lacks as "?".

  A pipe that was closed (`| head`), or a terminal that is gone, is a request to end. What is
  written after it goes nowhere.
  """

  def __init__(self, stream: Any) -> None:
    """Takes the stream's place; a real one's encoding is told to replace characters."""
    self._stream, self._closed = stream, False
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="replace")

  def write(self, text: str) -> int:
    """Writes, unless nobody reads."""
    return self._unless_closed(lambda: self._stream.write(text)) or len(text)

  def flush(self) -> None:
    """Flushes, unless nobody reads."""
    self._unless_closed(self._stream.flush)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _unless_closed(self, action: Callable[[], Any]) -> Any:
    if self._closed:
      return None
    try:
      return action()
    except OSError as error:
      self._closed = True
      who = f"output that cannot be written ({error.strerror})"
      if isinstance(error, BrokenPipeError):
        who = "closed output"
      # What is still in the buffer would fail again when the interpreter ends.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
    if Interrupt._active:
      Interrupt._active[-1].ask(who)
    return None
