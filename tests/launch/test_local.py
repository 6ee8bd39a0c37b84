"""The launcher of local processes: arguments, output, statuses, signals. No process uses jax."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dense_jax.errors import InputError
from launch import local
from tests.helpers import ROOT
from tests.launch.stand_ins import is_running

LAUNCHER = [sys.executable, str(ROOT / "launch" / "local.py")]
# The last argument of a process is its number.
NUMBER = "import os, signal, sys, time\nnumber = int(sys.argv[-1].removeprefix('--process-id='))\n"


def start(processes, script, *options):
  return subprocess.Popen(
      [*LAUNCHER, "--processes", str(processes), *options, "--",
       sys.executable, "-c", NUMBER + script],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )


def run(processes, script, *options):
  process = start(processes, script, *options)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_each_process_gets_its_place_and_its_devices(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_force_host_platform_device_count=8")
  script = "print(*sys.argv[1:], os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS'])"
  status, out, err = run(2, script, "--devices-per-process", "3")
  assert status == 0
  coordinator, *rest = out.split()
  assert coordinator.startswith("--coordinator=127.0.0.1:")
  devices = ["cpu", "--xla_dump_to=x", "--xla_force_host_platform_device_count=3"]
  assert rest == ["--processes=2", "--process-id=0", *devices]
  assert f"[1] {coordinator} --processes=2 --process-id=1 {' '.join(devices)}" in err


def test_the_first_failure_is_the_status():
  status, _, err = run(3, "time.sleep(number); sys.exit([0, 7, 1][number])")
  assert status == 7
  assert "process 1 had status 7" in err and "process 2 had status 1" in err
  assert "process 0 had" not in err


def test_a_killed_process_is_named():
  status, _, err = run(2, "number and os.kill(os.getpid(), signal.SIGKILL)")
  assert status == 128 + signal.SIGKILL
  assert "process 1 was killed by SIGKILL" in err


def test_who_hangs_after_a_failure_is_killed(monkeypatch, capfd):
  monkeypatch.setattr(local, "GRACE_SECONDS", 0.2)
  script = NUMBER + "sys.exit(5) if number else time.sleep(60)"
  before = [signal.getsignal(number) for number in local._PASSED_ON]
  assert local.main(["--processes", "2", "--", sys.executable, "-c", script]) == 5
  assert [signal.getsignal(number) for number in local._PASSED_ON] == before
  err = capfd.readouterr().err
  assert "killing 0: still there after 0.2 s" in err
  assert "process 0 was killed by SIGKILL" in err


# Processes that keep the output of process 1 open when it is killed.
ORPHANS = """\
import subprocess
if not number: sys.exit()
sleep = [sys.executable, "-IS", "-c", "import time; time.sleep(60)"]
orphan = subprocess.Popen(sleep, start_new_session={leaves})
print("orphan", orphan.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_behind_is_killed():
  status, _, err = run(2, ORPHANS.format(leaves=False))
  assert status == 128 + signal.SIGKILL
  orphan = int(re.search(r"^\[1\] orphan (\d+)$", err, re.M)[1])
  until = time.monotonic() + 10
  while is_running(orphan) and time.monotonic() < until:
    time.sleep(0.02)
  assert not is_running(orphan)


def test_a_process_that_left_its_group_does_not_stop_the_end(monkeypatch, capfd):
  monkeypatch.setattr(local, "_READ_SECONDS", 0.2)
  script = NUMBER + ORPHANS.format(leaves=True)
  begin = time.monotonic()
  assert local.main(["--processes", "2", "--", sys.executable, "-c", script]) == 137
  assert time.monotonic() - begin < 30
  os.kill(int(re.search(r"orphan (\d+)", capfd.readouterr().err)[1]), signal.SIGKILL)


def test_a_signal_between_two_starts_reaches_all(monkeypatch, capfd):
  start, started = subprocess.Popen, []

  def interrupted(*arguments, **options):
    if started:
      os.kill(os.getpid(), signal.SIGTERM)
    started.append(start(*arguments, **options))
    return started[-1]

  monkeypatch.setattr(subprocess, "Popen", interrupted)
  script = "import time; time.sleep(60)"
  assert local.main(["--processes", "2", "--", sys.executable, "-c", script]) == 143
  assert [child.returncode for child in started] == [-signal.SIGTERM] * 2
  assert capfd.readouterr().err.count("was killed by SIGTERM") == 2


def test_an_error_between_two_starts_ends_the_first(monkeypatch):
  start, started = subprocess.Popen, []

  def fails_second(*arguments, **options):
    if started:
      raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    started.append(start(*arguments, **options))
    return started[-1]

  monkeypatch.setattr(subprocess, "Popen", fails_second)
  with pytest.raises(InputError, match=r"cannot be started \(Resource temporarily unavailable\)"):
    local.main(["--processes", "2", "--", sys.executable, "-c", "import time; time.sleep(60)"])
  assert started[0].returncode == -signal.SIGKILL


def test_an_unknown_program_is_status_2_without_a_traceback():
  process = subprocess.run(
      [*LAUNCHER, "--processes", "2", "--", "no-such-program"], capture_output=True, text=True
  )
  assert process.returncode == 2
  assert process.stderr == (
      "error: 'no-such-program' cannot be started (No such file or directory): expected a program "
      "after --\n"
  )


@pytest.mark.parametrize("number", [
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1,
])
def test_signals_are_passed_on_once(tmp_path, number):
  script = (
      "got = []\n"
      "for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):\n"
      "  signal.signal(each, lambda n, _: got.append(n))\n"
      f"open({str(tmp_path)!r} + f'/{{number}}', 'w').close()\n"
      "while not got: time.sleep(0.01)\n"
      "time.sleep(0.2)\n"
      "sys.exit(10 * len(got) + (got[0] == signal.SIGINT))\n"
  )
  process = start(2, script)
  while process.poll() is None and len(list(tmp_path.iterdir())) < 2:
    time.sleep(0.01)
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == (11 if number == signal.SIGINT else 10), err


@pytest.mark.parametrize("options", [
    ["--processes", "0"], ["--processes", "two"], ["--processes", "2"],
    ["--processes", "2", "--devices-per-process", "-1"],
])
def test_bad_arguments_are_status_2(options, capsys):
  command = [] if options == ["--processes", "2"] else ["--", "true"]
  with pytest.raises(SystemExit) as end:
    local.main([*options, *command])
  assert end.value.code == 2
  assert "usage" in capsys.readouterr().err
