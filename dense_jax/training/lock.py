"""A lock on a run's folder: one process at a time may write, and it notices if the folder is lost.

The lock is the file `lock.json` in the run's folder. It says who holds it, and has a number that
the holder increases every ten seconds. On a local file system the holder also holds an flock on
the file, which ends with the process, even by a kill; so a dead run on the same machine is
recognised at once. In a bucket, or if the holder is on another machine, the lock counts as dead
when its number has not changed for 35 seconds.
"""

import contextlib
import functools
import json
import logging
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
_LOG = logging.getLogger(__name__)
_RENEW_SECONDS = 10.0
# A holder whose number has not changed for so long is dead.
_SILENT_SECONDS = 35.0
# The interval at which the holder checks that its folder is still there.
_LOOK_SECONDS = 2.0
# A holder that has not written for so long is dead: no two machines' clocks differ by that much.
_SURELY_SILENT_SECONDS = 600.0
_CONTENT_BYTES = 512
_READ_BYTES = 4096
_BEGIN = b'{"host": '


class RunLock:
  """The exclusive right to write into a run's folder; see the module."""

  def __init__(self, workdir: epath.Path, say: Callable[[str], None]) -> None:
    """Takes the lock, and makes the folder if it does not exist.

    Args:
      workdir: the run's folder.
      say: called with a sentence if the lock of a dead run is taken over, or if it takes a while
        to find out whether the holder is dead.

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
      handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
      try:
        locked = try_lock(handle)
        if locked and not _is_at(handle, self._file):
          continue  # Its holder released it in between: the name is now another file's, or none's.
        holder = self._holder(os.pread(handle, _READ_BYTES, 0))
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
    holder = self._holder(self._remote_content())
    if holder:
      self._wait_for_silence(holder, say, self._read_remote)
      say(f"took over the lock of a run that ended without releasing it: {_name(holder)}")
    self._renew()

  def _wait_for_silence(
      self, holder: dict[str, Any], say: Callable[[str], None], read: Callable[[], dict[str, Any]]
  ) -> None:
    """Waits until the holder is known to be dead, or has released the lock.

    Raises:
      InputError: the lock's content changed, so its holder is alive.
    """
    say(f"--workdir is locked: {_name(holder)}; waiting {_SILENT_SECONDS:.0f} s for a sign of life")
    deadline = time.monotonic() + _SILENT_SECONDS
    while True:  # It looks after each wait: this process may have been held up, too.
      time.sleep(min(_LOOK_SECONDS, _SILENT_SECONDS / 4))
      now = read()
      if not now:
        return
      if now != holder:
        raise self._held(now)
      if time.monotonic() >= deadline:
        return

  def _held(self, holder: dict[str, Any]) -> InputError:
    return invalid(
        "--workdir", str(self._workdir),
        f"a folder into which no other run writes; this one is used by {_name(holder)}",
    )

  def _remote_content(self) -> bytes:
    try:
      return self._file.read_bytes()
    except FileNotFoundError:
      return b""

  def _read_remote(self) -> dict[str, Any]:
    return _parse(self._remote_content())

  def _holder(self, content: bytes) -> dict[str, Any]:
    """Returns who holds the lock, which is to be taken, or {} if nobody does.

    Raises:
      InputError: the file is another program's, and no lock may overwrite it.
    """
    said = content.strip(b"\0 \n")  # A crash of the machine may leave zeros.
    if said and not said.startswith(_BEGIN):
      raise invalid(
          "--workdir", str(self._workdir), f"a folder in which no other program has a {LOCK_FILE}"
      )
    return _parse(content)

  def _renew(self) -> None:
    """Increases the number and writes the lock's content."""
    self._content["alive"] += 1
    content = json.dumps(self._content).encode()
    if self._handle is None:
      self._file.write_bytes(content)
    else:
      # Padded to a fixed length, so that no reader sees the end of older content, and truncated
      # to it, in case another writer left more.
      os.pwrite(self._handle, content.ljust(_CONTENT_BYTES), 0)
      os.ftruncate(self._handle, _CONTENT_BYTES)

  def _keep(self) -> None:
    """Runs in the holder's thread: renews the lock, and checks that it is still the holder's."""
    renewed = time.monotonic()
    # A bucket is read as seldom as it is written.
    while not self._ended.wait(_RENEW_SECONDS if is_remote(self._workdir) else _LOOK_SECONDS):
      if self._look():
        return
      if time.monotonic() - renewed >= _RENEW_SECONDS:
        # A full disk is for the run itself to report, and so is a bucket without an answer, which
        # has errors of its own.
        with contextlib.suppress(Exception):
          self._renew()
        renewed = time.monotonic()

  def _look(self) -> str:
    """Returns what is wrong with the lock; "" if it is still this process's."""
    try:
      if self._handle is None:
        gone, holder = False, self._read_remote()
      else:
        gone, holder = not _is_at(self._handle, self._file), _read(self._handle)
      if gone or not holder:
        self._lost = f"it, or {LOCK_FILE} in it, was removed, replaced or unmounted"
      elif not self._is_own(holder):
        self._lost = f"it was taken over by {_name(holder)}"
    except Exception:  # What does not answer now may answer later: a file system, or a bucket.
      _LOG.debug("the lock could not be read", exc_info=True)
    return self._lost

  def _is_own(self, holder: dict[str, Any]) -> bool:
    return holder.get("token") == self._content["token"]

  def check(self) -> None:
    """Checks that the folder still exists and is still this run's.

    Raises:
      InputError: it does not, or is not; nothing more can be saved.
    """
    if self._lost or self._look():
      raise InputError(
          f"--workdir = {str(self._workdir)!r} is gone while the run writes into it: {self._lost}. "
          "Training stops, as nothing more can be saved"
      )

  @property
  def lost(self) -> bool:
    """True once the holder's thread has noticed that the folder is lost; does no I/O."""
    return bool(self._lost)

  def release(self) -> None:
    """Releases the lock, and removes the folders that were made for it if they are empty."""
    self._ended.set()
    if self._thread.is_alive():
      self._thread.join()
    with contextlib.suppress(Exception):  # As in `_keep`.
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
  """Returns the folders that must be made to make `workdir`, the innermost first."""
  if is_remote(workdir):
    return []
  folder, missing = Path(workdir).absolute(), []
  while not folder.exists() and folder != folder.parent:
    missing.append(folder)
    folder = folder.parent
  return missing


def _is_at(handle: int, file: epath.Path) -> bool:
  """Returns whether the open file is the one that has this name."""
  try:
    return os.path.samestat(os.fstat(handle), os.stat(file))
  except (FileNotFoundError, NotADirectoryError):
    return False


def _read(handle: int) -> dict[str, Any]:
  return _parse(os.pread(handle, _READ_BYTES, 0))


def _parse(content: bytes) -> dict[str, Any]:
  """Parses a lock's content: the holder, or {} if there is none."""
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
