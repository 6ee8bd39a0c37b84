"""Every signal at every stage: a clean end with a sentence, and never a hang.

Each case is a small program of its own, which says where it is by lines on its standard output.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT

# A call that lets other threads run, but hears no signal for minutes: as a compilation does.
STUCK = "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2_000_000_000)"
BEGIN = """
import hashlib, os, sys, threading, time
from dense_jax import interrupt
sys.stdout, sys.stderr = interrupt.Output(sys.stdout), interrupt.Output(sys.stderr)
def say(*text): print(*text, flush=True)
"""
AT_ONCE = BEGIN + """
with interrupt.Interrupt(lambda: "step 3 is saved") as asked:
  try:
    say("ready")
    {stage}
    say("not stopped")
  except KeyboardInterrupt as stopped:
    {cleanup}
    say("cleaned up")
    print(stopped, file=sys.stderr)
    sys.exit(1)
"""
WAITING = BEGIN + """
with interrupt.Interrupt() as asked:
  asked.wait(lambda: "step 3 is saved")
  say("ready")
  {stage}
  say("saved after", asked.requested)
  sys.exit(1)
"""
UNTIL_ASKED = "while not asked.requested: time.sleep(0.01)"


def start(program, *, prefix=(), **options):
  return subprocess.Popen(
      [*prefix, sys.executable, "-c", program], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
  )


def at_stage(program, **options):
  process = start(program, **options)
  assert process.stdout.readline() == "ready\n"
  return process


def end(process, seconds=20):
  began = time.monotonic()
  out, err = process.communicate(timeout=60)
  assert time.monotonic() - began < seconds
  assert "Traceback" not in err
  return process.returncode, out, err


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU"])
def test_every_signal_is_obeyed_at_once_where_nothing_is_lost(name):
  process = at_stage(AT_ONCE.format(stage="time.sleep(60)", cleanup="pass"))
  process.send_signal(getattr(signal, f"SIG{name}"))
  status, out, err = end(process)
  assert (status, out) == (1, "cleaned up\n")
  assert f"SIG{name}: step 3 is saved" in err


def test_a_main_thread_that_hears_nothing_is_ended_from_outside():
  process = at_stage(AT_ONCE.format(stage=STUCK, cleanup="pass"))
  time.sleep(0.3)  # Until it is in the call.
  process.send_signal(signal.SIGTERM)
  status, out, err = end(process, seconds=10)
  assert (status, out) == (1, "")
  assert "SIGTERM: step 3 is saved" in err


def test_cleaning_up_is_not_interrupted_by_another_signal():
  process = at_stage(AT_ONCE.format(stage="time.sleep(60)", cleanup="time.sleep(0.7)"))
  process.send_signal(signal.SIGTERM)
  time.sleep(0.3)
  process.send_signal(signal.SIGINT)
  status, out, err = end(process)
  assert (status, out) == (1, "cleaned up\n")
  assert "SIGTERM: step 3 is saved" in err


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_request_waits_for_the_step(name):
  process = at_stage(WAITING.format(stage=UNTIL_ASKED + "\n  time.sleep(0.2)"))
  process.send_signal(getattr(signal, f"SIG{name}"))
  assert end(process)[:2] == (1, f"saved after SIG{name}\n")


def test_what_comes_within_a_second_is_the_same_request():
  process = at_stage(WAITING.format(stage=UNTIL_ASKED + "\n  time.sleep(1.5)"))
  for _ in range(3):
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
  assert end(process)[:2] == (1, "saved after SIGINT\n")


@pytest.mark.parametrize("stage", ["time.sleep(60)", STUCK], ids=["sleeping", "stuck"])
def test_a_second_request_ends_at_once(stage):
  process = at_stage(WAITING.format(stage=stage))
  time.sleep(0.3)
  process.send_signal(signal.SIGTERM)
  time.sleep(1.3)
  process.send_signal(signal.SIGTERM)
  status, out, err = end(process, seconds=10)
  assert (status, out) == (1, "")
  assert "SIGTERM: step 3 is saved" in err


def test_a_request_that_waited_is_obeyed_when_the_work_is_done():
  stage = f"""asked.wait(lambda: "half is saved")
    say("waiting")
    {UNTIL_ASKED}
    asked.obey(lambda: "all is saved")"""
  process = at_stage(AT_ONCE.format(stage=stage, cleanup="pass"))
  assert process.stdout.readline() == "waiting\n"
  process.send_signal(signal.SIGTERM)
  status, out, err = end(process)
  assert (status, out) == (1, "cleaned up\n")
  assert "SIGTERM: all is saved" in err


def test_nohup_is_heard():
  program = AT_ONCE.format(stage="time.sleep(1)", cleanup="pass")
  process = at_stage(program, prefix=["nohup"], stdin=subprocess.DEVNULL)
  process.send_signal(signal.SIGHUP)
  assert end(process)[:2] == (0, "not stopped\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_output_is_a_request(stream, tmp_path):
  stage = f"""while not asked.requested: print("line", file=sys.{stream}, flush=True)
  with open({str(tmp_path / "said")!r}, "w") as file: file.write(asked.requested)"""
  process = at_stage(WAITING.format(stage=stage))
  getattr(process, stream).close()
  other = process.stderr if stream == "stdout" else process.stdout
  assert "Traceback" not in other.read()
  assert process.wait(timeout=20) == 1
  assert (tmp_path / "said").read_text() == "closed output"


def test_a_closed_output_ends_a_command_that_has_nothing_to_save():
  command = AT_ONCE.format(stage="while True: say('line')", cleanup="pass")
  process = at_stage(command)
  process.stdout.close()
  assert "closed output: step 3 is saved" in process.stderr.read()
  assert process.wait(timeout=20) == 1


def test_an_output_shows_what_its_encoding_lacks():
  environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
  process = start(BEGIN + "say('na\\u00efve \\u2192')", env=environment, encoding="latin-1")
  assert process.communicate(timeout=60)[0] == "na\u00efve ?\n"
  assert process.returncode == 0


def test_a_thread_that_does_not_end_holds_nothing_up():
  program = BEGIN + f"""
threading.Thread(target=lambda: {STUCK}).start()
with interrupt.Interrupt() as asked:
  asked.done(5)
sys.exit(0)
"""
  assert end(start(program), seconds=15)[0] == 5


def test_before_a_command_begins():
  program = BEGIN + "interrupt.end_early()\nsay('ready')\ntime.sleep(60)"
  process = at_stage(program)
  process.send_signal(signal.SIGINT)
  status, _, err = end(process)
  assert status == 1
  assert "SIGINT: ended before anything was done" in err
