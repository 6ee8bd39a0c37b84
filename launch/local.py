#!/usr/bin/env python3
"""Runs a training command as several processes on this machine.

    python launch/local.py --processes 2 --devices-per-process 4 -- \
        python -m dense_jax.cli.train --config experiments/smoke.py:debug --workdir runs/two

The processes are those of a cluster: jax.distributed joins them, over the loopback device, and
gloo carries what they tell each other. Their devices are simulated on the CPU. The command gets
--coordinator, --processes and --process-id appended.

What process 0 prints is shown as it is, lines of the others as "[1] ...". Ctrl-C, SIGTERM, a
closed terminal and what schedulers send are passed on. When a process fails, the others have 20
seconds to notice and to end; then they are killed. The status is that of the first process that
failed, 128 + N after signal N.
"""

import argparse
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

GRACE_SECONDS = 20.0
# What asks a training process to save and to end.
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
              signal.SIGUSR2, signal.SIGXCPU)


def _integer(text: str) -> int:
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
  return int(text)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=_integer, required=True, metavar="N")
  parser.add_argument("--devices-per-process", type=_integer, default=1, metavar="N")
  parser.add_argument("command", nargs="+", help="after --: the command, with its arguments")
  return parser.parse_args(arguments)


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def _environment(devices: int) -> dict[str, str]:
  """This one's, with so many simulated devices."""
  count = "--xla_force_host_platform_device_count"
  flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(count)]
  flags.append(f"{count}={devices}")
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def _show(number: int, child: subprocess.Popen[str]) -> None:
  """Copies a process's output, line by line."""
  assert child.stdout is not None
  for line in child.stdout:
    with contextlib.suppress(OSError):  # Nobody reads; the process must not wait for that.
      print(f"[{number}] {line}", end="", file=sys.stderr, flush=True)


def _start(options: argparse.Namespace) -> list[subprocess.Popen[str]]:
  coordinator = f"127.0.0.1:{_free_port()}"
  children = []
  for number in range(options.processes):
    children.append(
        subprocess.Popen(
            [*options.command, f"--coordinator={coordinator}",
             f"--processes={options.processes}", f"--process-id={number}"],
            env=_environment(options.devices_per_process),
            stdout=subprocess.PIPE if number else None,
            stderr=subprocess.STDOUT if number else None,
            text=True,
            errors="replace",
            # A terminal's Ctrl-C would reach them twice, and the second is obeyed at once.
            start_new_session=True,
        )
    )
  return children


def _wait(children: Sequence[subprocess.Popen[str]]) -> int:
  """Waits for all; returns the status of the first that failed."""
  running = dict(enumerate(children))
  status, deadline = 0, math.inf
  while running:
    for number, child in list(running.items()):
      code = child.poll()
      if code is None:
        continue
      del running[number]
      if not code:
        continue
      how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"had status {code}"
      print(f"process {number} {how}", file=sys.stderr, flush=True)
      if not status:
        status, deadline = code if code > 0 else 128 - code, time.monotonic() + GRACE_SECONDS
    if running and time.monotonic() > deadline:
      # Not SIGTERM, which asks for a checkpoint: without the one that failed there is none.
      print(f"killing {', '.join(map(str, running))}: still there after {GRACE_SECONDS:g} s",
            file=sys.stderr, flush=True)
      for child in running.values():
        child.kill()
      deadline = math.inf
    time.sleep(0.05)
  return status


def main(arguments: Sequence[str]) -> int:
  """Runs the command; returns the status."""
  options = _parse(arguments)
  children = _start(options)

  def pass_on(number: int, frame: FrameType | None) -> None:
    del frame
    for child in children:
      child.send_signal(number)  # Does nothing where the process has ended.

  for number in _PASSED_ON:
    # nohup ignores SIGHUP, for the processes too.
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, pass_on)
  pids = (f"process {number} is {child.pid}" for number, child in enumerate(children))
  print(", ".join(pids), file=sys.stderr, flush=True)
  readers = [
      threading.Thread(target=_show, args=(number, child))
      for number, child in enumerate(children) if number
  ]
  for reader in readers:
    reader.start()
  status = _wait(children)
  for reader in readers:
    reader.join()
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
