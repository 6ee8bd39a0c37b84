"""Ends a process on request: by a signal, or because nobody reads its output any more.

A command that has nothing to lose obeys a request at once, by raising `Stopped`. A command that
trains finishes and saves the step first. A watcher thread makes sure that the process ends in
either case: Python runs signal handlers only between bytecodes of the main thread, and a
compilation can keep that busy for minutes.
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

# The signals that people, terminals and schedulers send to end a process.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
# If the main thread has not obeyed a request after so long, the watcher thread ends the process.
_GRACE_SECONDS = 3.0
# A launcher and a terminal may both pass on one request: a signal that follows so soon is the
# same request.
_SAME_REQUEST_SECONDS = 1.0
_GOODBYE_SECONDS = 3.0
_STATUS = 1
_NO_MORE = b"\0"  # Stops the watcher thread; no signal has the number 0.


class Stopped(KeyboardInterrupt):
  """Raised to end the process on request; the message says who asked and what is saved."""


def _listens_to(number: int) -> bool:
  """Returns whether a signal is handled: all but a SIGHUP that is ignored, as nohup sets it."""
  return number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN


def open_closed_streams() -> None:
  """Connects the standard streams that the process was started without (`>&-`) to the null device.

  Otherwise the next files to be opened, such as a lock or metrics.jsonl, would get their file
  descriptors, and printed output would be written into those files.
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
  """Lets signals end the process with a message and status 1, until an `Interrupt` takes over."""

  def end(number: int, frame: FrameType | None) -> None:
    del frame
    os.write(2, f"\n{signal.Signals(number).name}: ended before anything was done\n".encode())
    os._exit(_STATUS)

  for number in filter(_listens_to, SIGNALS):
    signal.signal(number, end)


class Interrupt:
  """A context manager that turns signals into a request to end; the innermost one handles them.

  Attributes:
    requested: who asked first, such as "SIGTERM"; "" if nobody has.
  """

  _active: ClassVar["list[Interrupt]"] = []

  def __init__(
      self, meanwhile: Callable[[], str] = lambda: "ended before its work was done", *,
      ends_process: bool = True,
  ) -> None:
    """Prepares the context; once entered, it obeys requests at once until `wait` is called.

    Args:
      meanwhile: returns a sentence that says what is saved and how to go on, if the process ends
        now. It may be called from another thread.
      ends_process: whether a second request, or one that the main thread does not obey in time,
        ends the process. If not, as in a notebook, a second request raises `Stopped`.
    """
    self.requested = ""
    self._meanwhile = meanwhile
    self._ends_process = ends_process
    self._asked = -math.inf
    self._waits = False
    self._obeyed = False
    self._before: dict[int, Any] = {}

  def wait(self, meanwhile: Callable[[], str]) -> None:
    """Defers requests from now on: the caller must read `requested`; a second one ends the process.

    Args:
      meanwhile: as in the constructor, from now on.

    Raises:
      Stopped: there is a request already.
    """
    self.obey(meanwhile)
    self._waits = True

  def obey(self, meanwhile: Callable[[], str]) -> None:
    """Obeys requests at once from now on.

    Args:
      meanwhile: as in the constructor, from now on.

    Raises:
      Stopped: there is a request already.
    """
    self._meanwhile, self._waits = meanwhile, False
    if self.requested:
      # A `Stopped` that was raised inside a library's callback may have been swallowed there.
      self._obeyed = False
      self._stop()

  def ask(self, who: str) -> None:
    """Requests the end of the process.

    Args:
      who: who asks, for messages.

    Raises:
      Stopped: requests are obeyed at once, and this is the main thread. It is raised only once,
        so that clean-up is not interrupted.
    """
    self.requested = self.requested or who
    if not self._waits and threading.current_thread() is threading.main_thread():
      self._stop()

  def done(self, status: int) -> None:
    """Declares the process's work done: signals are ignored, and it ends within 3 s.

    If a library's thread keeps the interpreter from ending, such as one that prepares a huge
    batch, the process exits hard without waiting for it.

    Args:
      status: the exit status of a hard exit.
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
    """Runs in the watcher thread: ends the process if the main thread does not, or if asked twice.

    The signals' numbers arrive through the wake-up pipe, without the help of the main thread.
    """
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

    # Neither a terminal that hangs nor a main thread that holds a lock may keep it from ending.
    goodbye = threading.Thread(target=say, daemon=True)
    goodbye.start()
    goodbye.join(_GOODBYE_SECONDS)
    os._exit(_STATUS)


class Break:
  """A context in which SIGINT, as Ctrl-C sends it, breaks off a part of the work, not the process.

  All other signals are handled as outside of it. Outside the main thread it changes nothing.

  Attributes:
    asked: whether SIGINT came; set to false before a part of the work.
    raises: whether SIGINT also raises KeyboardInterrupt, as is needed to leave `input`.
  """

  def __init__(self) -> None:
    self.asked, self.raises = False, False
    self._is_main = threading.current_thread() is threading.main_thread()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self.asked = True
    if self.raises:
      raise KeyboardInterrupt

  def __enter__(self) -> "Break":
    if self._is_main:
      # The watcher thread of an `Interrupt` would end the process.
      self._wakeup = signal.set_wakeup_fd(-1)
      self._before = signal.signal(signal.SIGINT, self._handle)
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: TracebackType | None,
  ) -> None:
    if self._is_main:
      signal.signal(signal.SIGINT, self._before)
      signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)


class Output:
  """A standard stream that survives the loss of its reader, and prints "?" for unencodable text.

  A closed pipe (`| head`) or a terminal that is gone counts as a request to end. Anything
  written after that is discarded.
  """

  def __init__(self, stream: Any) -> None:
    """Wraps a stream, and sets its encoding to replace characters if it is a real one."""
    self._stream, self._closed = stream, False
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="replace")

  def write(self, text: str) -> int:
    """Writes `text`, unless the stream is closed; returns the number of characters."""
    return self._unless_closed(lambda: self._stream.write(text)) or len(text)

  def flush(self) -> None:
    """Flushes the stream, unless it is closed."""
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
      # The text left in the buffer would fail again when the interpreter ends.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
    if Interrupt._active:
      Interrupt._active[-1].ask(who)
    return None
