"""The lock on a run's folder: who may write, and the lock of a holder that is gone."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from dense_jax.errors import InputError
from dense_jax.training import lock
from dense_jax.training.lock import LOCK_FILE, RunLock
from tests.helpers import ROOT

HOLD = """
import sys, time
from etils import epath
from dense_jax.training.lock import RunLock
lock = RunLock(epath.Path(sys.argv[1]), print)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  for name, seconds in (("_RENEW", 0.1), ("_SILENT", 1.0), ("_LOOK", 0.05)):
    monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)


@pytest.fixture
def take(tmp_path):
  """Takes the folder's lock, records what it says, and releases all locks in the end."""
  said, locks = [], []

  def take(folder=tmp_path):
    locks.append(RunLock(epath.Path(folder), said.append))
    return locks[-1]

  take.said = said
  yield take
  for held in locks:
    held.release()


def hold(folder):
  """Starts another process, which holds the lock."""
  process = subprocess.Popen(
      [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  return process


def elsewhere(folder, **content):
  """Makes a lock of a process on another machine."""
  described = {"host": "other", "pid": 12, "since": "noon", "token": "x", "alive": 1} | content
  (folder / LOCK_FILE).write_text(json.dumps(described))


def test_a_second_run_is_refused_by_the_name_of_the_first(take, tmp_path):
  first = take()
  with pytest.raises(InputError, match=rf"--workdir.* used by process {os.getpid()} on"):
    take()
  first.release()
  assert not (tmp_path / LOCK_FILE).exists()
  take()
  assert not take.said


def test_of_many_that_begin_together_one_gets_it(tmp_path):
  taken, refused, gate = [], [], threading.Barrier(8)

  def begin():
    gate.wait()
    try:
      taken.append(RunLock(epath.Path(tmp_path), lambda _: None))
    except InputError:
      refused.append(1)

  threads = [threading.Thread(target=begin) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(taken), len(refused)) == (1, 7)
  taken[0].release()


def test_a_killed_holders_lock_is_taken_over_and_said(take, tmp_path):
  process = hold(tmp_path)
  with pytest.raises(InputError, match=f"used by process {process.pid} on"):
    take()
  process.kill()
  process.wait()
  take()
  (said,) = take.said  # It is known at once: nothing is said of waiting.
  assert "took over" in said and f"process {process.pid} on" in said


def test_a_stopped_holder_still_holds_it(take, tmp_path):
  process = hold(tmp_path)
  process.send_signal(signal.SIGSTOP)
  with pytest.raises(InputError, match=f"used by process {process.pid} on"):
    take()
  process.kill()
  process.wait()


def test_another_machines_lock_is_dead_when_it_stands_still(take, tmp_path):
  elsewhere(tmp_path)
  take()
  assert [s for s in take.said if "took over" in s and "process 12 on other, since noon" in s]


def test_another_machines_lock_that_is_old_is_not_waited_for(take, tmp_path):
  elsewhere(tmp_path)
  os.utime(tmp_path / LOCK_FILE, (1e9, 1e9))
  take()
  (said,) = take.said
  assert "took over" in said


def test_another_machines_lock_is_alive_while_it_counts(tmp_path):
  elsewhere(tmp_path)

  def count(said):
    """Is called when the wait begins."""
    assert "waiting 1 s for a sign of life" in said
    elsewhere(tmp_path, alive=2)

  with pytest.raises(InputError, match="used by process 12 on other"):
    RunLock(epath.Path(tmp_path), count)


def test_the_last_look_is_after_the_wait(tmp_path, monkeypatch):
  """A process that was held up for as long as it is to wait has not seen the lock stand still."""
  monkeypatch.setattr(lock, "_SILENT_SECONDS", 0.0)
  elsewhere(tmp_path)
  with pytest.raises(InputError, match="used by process 12 on other"):
    RunLock(epath.Path(tmp_path), lambda _: elsewhere(tmp_path, alive=2))


def test_a_file_system_without_locks_goes_by_the_number(take, tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr("fcntl.flock", refuse)
  monkeypatch.setattr(lock, "_SILENT_SECONDS", 60.0)  # It ends with the holder's next number.
  first = take()
  with pytest.raises(InputError, match=f"used by process {os.getpid()}"):
    take()
  first.release()
  take()


@pytest.mark.parametrize("content", ["", "\n", "\0" * 99, '{"host": "a", "pi', '{"host": [' * 40])
def test_a_damaged_lock_is_taken_over(take, tmp_path, content):
  (tmp_path / LOCK_FILE).write_text(content)
  take().check()


@pytest.mark.parametrize("content", ["garbage", "x" * 100_000, "[]", "{}", '{"hosts": "a"}'])
def test_another_programs_file_is_no_lock(take, tmp_path, content):
  (tmp_path / LOCK_FILE).write_text(content)
  with pytest.raises(InputError, match=r"in which no other program has a lock\.json"):
    take()
  assert (tmp_path / LOCK_FILE).read_text() == content


def test_a_link_is_no_lock(take, tmp_path):
  (tmp_path / "elsewhere").write_text("")
  (tmp_path / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
  with pytest.raises(InputError, match=r"lock\.json: Too many levels of symbolic links"):
    take()
  assert (tmp_path / "elsewhere").read_text() == ""


def test_a_bucket_that_does_not_answer_for_a_while_costs_no_lock(take, tmp_path, monkeypatch):
  holder, renew, failing = take(), RunLock._renew, threading.Event()

  def fail(self):
    failing.set()
    raise RuntimeError("503")  # What a bucket's library raises is no OSError.

  monkeypatch.setattr(RunLock, "_renew", fail)
  monkeypatch.setattr(lock, "_read", fail)
  assert failing.wait(10)
  monkeypatch.setattr(RunLock, "_renew", renew)
  monkeypatch.undo()
  before = (tmp_path / LOCK_FILE).read_bytes()
  end = time.monotonic() + 30
  while (tmp_path / LOCK_FILE).read_bytes() == before:
    assert time.monotonic() < end
    time.sleep(0.05)
  holder.check()


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced", "taken over"])
def test_a_folder_that_is_gone_is_noticed(take, tmp_path, how):
  folder = tmp_path / "run"
  held = take(folder)
  held.check()
  if how == "taken over":
    elsewhere(folder)
  else:
    folder.rename(tmp_path / "aside")
  if how == "replaced":
    folder.mkdir()
    elsewhere(folder)
  deadline = time.monotonic() + 60
  while not held.lost:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  with pytest.raises(InputError, match=r"--workdir = '.*' is gone while the run writes into it"):
    held.check()


def test_what_it_made_goes_with_it_unless_it_is_used(take, tmp_path):
  take(tmp_path / "a" / "b").release()
  assert not list(tmp_path.iterdir())
  held = take(tmp_path / "a" / "b")
  (tmp_path / "a" / "b" / "config.json").touch()
  held.release()
  assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["config.json"]
  (tmp_path / "there").mkdir()
  take(tmp_path / "there").release()
  assert (tmp_path / "there").is_dir()


@pytest.mark.parametrize("path", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_named(take, tmp_path, path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(InputError, match=r"--workdir = .* a folder that can be made and written"):
    take(tmp_path / path)
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
