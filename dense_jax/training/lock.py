"""One process at a time writes into a run's folder, and it notices when the folder is gone.

The lock is the file `lock.json` in the run's folder: who holds it, and a number that its holder
counts up every ten seconds. On a local file system the holder also has the file locked (flock),
which ends with the process however that ends, so that what a killed run left is known at once.
In a bucket, and where the holder is another machine, a lock is dead when its number stands still.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from dense_jax.config import invalid
from dense_jax.errors import InputError
from dense_jax.files import is_remote, parse_json, try_lock

LOCK_FILE = "lock.json"
_RENEW_SECONDS = 10.0
# A number that stands still for so long is that of a holder that is gone.
_SILENT_SECONDS = 35.0
# How often the holder looks whether its folder is still there.
_LOOK_SECONDS = 2.0
# A file that was not written for so long is not watched: no two clocks differ by that much.
_SURELY_SILENT_SECONDS = 600.0
_CONTENT_BYTES = 512


class RunLock:
  """The right to write into a run's folder; see the module."""

  def __init__(self, workdir: epath.Path, say: Callable[[str], None]) -> None:
    """Takes the lock, and makes the folder where it is missing.

    Args:
      workdir: the run's folder.
      say: called with a sentence where a lock that was left behind is taken over, or where it
        takes a while to know whether it was.

    Raises:
      InputError: another process holds the lock, or the folder cannot be made or written.
    """
    self._workdir = workdir
    self._file = workdir / LOCK_FILE
    self._content: dict[str, Any] = {
        "host": socket.gethostname(), "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "token": uuid.uuid4().hex, "alive": 0,
    }
    self._lost = ""
    self._handle: int | None = None
    self._made: list[Path] = []
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
    try:
      self._made = _missing_folders(workdir)
      workdir.mkdir(parents=True, exist_ok=True)
      take = self._take_remote if is_remote(workdir) else self._take_local
      take(say)
    except OSError as error:
      why = f"{LOCK_FILE}: {error.strerror}" if os.path.isdir(workdir) else error.strerror
      self.release()
      raise invalid(
          "--workdir", str(workdir), f"a folder that can be made and written ({why})"
      ) from error
    except BaseException:
      self.release()
      raise
    self._thread.start()

  def _take_local(self, say: Callable[[str], None]) -> None:
    while self._handle is None:
      handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        locked = try_lock(handle)
        if locked and not _is_at(handle, self._file):
          continue  # Its holder released it in between: the name is another file's now.
        holder = _read(handle)
        here = holder.get("host") == self._content["host"]
        if locked is False and (here or not holder):
          raise self._held(holder)
        if holder and not (here and locked):
          if time.time() - os.fstat(handle).st_mtime < _SURELY_SILENT_SECONDS:
            self._wait_for_silence(holder, say, functools.partial(_read, handle))
          if locked is False and not try_lock(handle):
            raise self._held(holder)
        if holder:
          say(f"took over the lock of a run that ended without releasing it: {_name(holder)}")
        self._handle, handle = handle, -1
      finally:
        if handle >= 0:
          os.close(handle)
    self._renew()

  def _take_remote(self, say: Callable[[str], None]) -> None:
    holder = self._read_remote()
    if holder:
      self._wait_for_silence(holder, say, self._read_remote)
      say(f"took over the lock of a run that ended without releasing it: {_name(holder)}")
    self._renew()

  def _wait_for_silence(
      self, holder: dict[str, Any], say: Callable[[str], None], read: Callable[[], dict[str, Any]]
  ) -> None:
    """Returns when the holder has not counted for a while; raises if it counts."""
    say(f"--workdir is locked: {_name(holder)}; waiting {_SILENT_SECONDS:.0f} s for a sign of life")
    deadline = time.monotonic() + _SILENT_SECONDS
    while time.monotonic() < deadline:
      time.sleep(min(_LOOK_SECONDS, _SILENT_SECONDS / 4))
      now = read()
      if not now:
        return
      if now != holder:
        raise self._held(now)

  def _held(self, holder: dict[str, Any]) -> InputError:
    return invalid(
        "--workdir", str(self._workdir),
        f"a folder into which no other run writes; this one is used by {_name(holder)}",
    )

  def _read_remote(self) -> dict[str, Any]:
    try:
      return _parse(self._file.read_bytes())
    except FileNotFoundError:
      return {}

  def _renew(self) -> None:
    """Writes the lock's content, with the next number."""
    self._content["alive"] += 1
    content = json.dumps(self._content).encode()
    if self._handle is None:
      self._file.write_bytes(content)
    else:
      # Of one length, so that a reader never sees an old end, and without that of another writer.
      os.pwrite(self._handle, content.ljust(_CONTENT_BYTES), 0)
      os.ftruncate(self._handle, _CONTENT_BYTES)

  def _keep(self) -> None:
    """The holder's thread: counts, and looks whether the lock is still its own."""
    renewed = time.monotonic()
    # A bucket is asked as seldom as it is written.
    while not self._ended.wait(_RENEW_SECONDS if is_remote(self._workdir) else _LOOK_SECONDS):
      if self._look():
        return
      if time.monotonic() - renewed >= _RENEW_SECONDS:
        with contextlib.suppress(OSError):  # A full disk is for the run itself to tell.
          self._renew()
        renewed = time.monotonic()

  def _look(self) -> str:
    """What is wrong with the lock; empty if it is still this process's."""
    try:
      if self._handle is None:
        gone, holder = False, self._read_remote()
      else:
        gone, holder = not _is_at(self._handle, self._file), _read(self._handle)
      if gone or not holder:
        self._lost = f"it, or {LOCK_FILE} in it, was removed, replaced or unmounted"
      elif not self._is_own(holder):
        self._lost = f"it was taken over by {_name(holder)}"
    except OSError:
      pass  # A file system that does not answer may do so again.
    return self._lost

  def _is_own(self, holder: dict[str, Any]) -> bool:
    return holder.get("token") == self._content["token"]

  def check(self) -> None:
    """Looks whether the folder is still there, and still this run's.

    Raises:
      InputError: it is not; nothing more can be saved.
    """
    if self._lost or self._look():
      raise InputError(
          f"--workdir = {str(self._workdir)!r} is gone while the run writes into it: {self._lost}. "
          "Training stops, as nothing more can be saved"
      )

  @property
  def lost(self) -> bool:
    """Whether the thread has noticed that the folder is gone; costs nothing."""
    return bool(self._lost)

  def release(self) -> None:
    """Gives the folder back; without anything else in it, removes it if it was made here."""
    self._ended.set()
    if self._thread.is_alive():
      self._thread.join()
    with contextlib.suppress(OSError):
      if self._handle is not None:
        if _is_at(self._handle, self._file):
          self._file.unlink()
        os.close(self._handle)
        self._handle = None
      elif is_remote(self._workdir) and self._is_own(self._read_remote()):
        self._file.unlink()
    for folder in self._made:
      try:
        os.rmdir(folder)
      except OSError:
        break


def _missing_folders(workdir: epath.Path) -> list[Path]:
  """The folders that making `workdir` makes, the innermost first."""
  if is_remote(workdir):
    return []
  folder, missing = Path(workdir).absolute(), []
  while not folder.exists() and folder != folder.parent:
    missing.append(folder)
    folder = folder.parent
  return missing


def _is_at(handle: int, file: epath.Path) -> bool:
  """Whether the open file is the one of that name."""
  try:
    return os.path.samestat(os.fstat(handle), os.stat(file))
  except (FileNotFoundError, NotADirectoryError):
    return False


def _read(handle: int) -> dict[str, Any]:
  return _parse(os.pread(handle, 4096, 0))


def _parse(content: bytes) -> dict[str, Any]:
  """The holder; empty where there is none."""
  if not content.strip():
    return {}
  try:
    holder = parse_json(content)
  except ValueError:
    holder = None
  return holder if isinstance(holder, dict) else {"host": "?"}


def _name(holder: dict[str, Any]) -> str:
  return (
      f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, "
      f"since {holder.get('since', '?')}"
  )
